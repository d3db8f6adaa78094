"""The reduced forms of timm's classes: token sizes travel with the tokens from block to block (spec 6.6)."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.state import Evidence, TokenRecords, TokenState

NO_CHECKPOINTING = (
    "Token reduction does not work with gradient checkpointing, which runs blocks twice. "
    "Call set_grad_checkpointing(False) on the network."
)


@dataclass(frozen=True)
class Reduction:
    """What a network was given.

    Attributes:
        reducers: `{block index: what the block does}`.
        proportional_attention: whether attention after a merge counts tokens by their sizes.
    """

    reducers: dict[int, Reducer]
    proportional_attention: bool = True


class ReducedTransformer(VisionTransformer):
    """A VisionTransformer whose token sizes travel with the tokens from block to block.

    With `global_pool="avg"` the tokens that `forward_features` returns carry their weights, so that their
    plain mean, which `forward_head` takes, is the size-weighted mean (spec 2.8).
    """

    token_reduction: Reduction
    token_records: TokenRecords | None

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (batch, 3, height, width) to tokens (batch, tokens left, channels) after the final norm."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                "A network with token reduction takes no attn_mask and no is_causal: they are laid out for "
                "the tokens that enter, and fewer reach the later blocks."
            )
        if self.grad_checkpointing:
            raise ValueError(NO_CHECKPOINTING)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        state = self._token_state()
        for index, block in enumerate(self.blocks):
            if index in self.token_reduction.reducers:
                x = block(x, state=state)
            else:
                x = block(x, attn_mask=state.bias)
        if self.token_records is not None and state.records is not None:
            self.token_records.passes.append(state.records)
        x = self.norm(x)
        if self.global_pool == "avg" and state.size is not None:
            x = x * _mean_weights(state.size, 0 if self.pool_include_prefix else state.prefix).to(x.dtype)
        return x

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the maps that it returns need a token for every patch."""
        raise NotImplementedError(
            "forward_intermediates and features_only need a token for every patch in every block, and token "
            "reduction removes some. Take features from the network without it."
        )

    def _token_state(self) -> TokenState:
        records = None if torch.compiler.is_compiling() else self.token_records
        return TokenState(
            self.num_prefix_tokens,
            self.token_reduction.proportional_attention,
            trace=records is not None and records.trace,
            record=records is not None,
        )


class ReducedDistilledTransformer(ReducedTransformer, VisionTransformerDistilled):
    """The same with a distillation token and two heads."""


class CompressingBlock(Block):
    """A block that removes tokens between its attention and its MLP (spec 2.1)."""

    block_index: int
    token_reducer: Reducer

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState | None = None,
    ) -> Tensor:
        """Tokens (batch, tokens, channels) to (batch, fewer tokens, channels)."""
        if state is None:
            raise NotImplementedError(
                f"blocks[{self.block_index}] removes tokens and needs the sizes of the blocks before it: "
                "call the network, not its blocks."
            )
        if self.token_reducer.keeps(x.shape[1], state.prefix) == x.shape[1]:
            x = super().forward(x, attn_mask=state.bias)
            state.record(self.block_index, x.shape[1])
            return x
        x = self._compressed(x, state)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _compressed(self, x: Tensor, state: TokenState) -> Tensor:
        """Attention and the rule; queries, keys and values are given back before the MLP needs its memory."""
        attended, evidence = attend(cast(Attention, self.attn), self.norm1(x), state.bias)
        x = x + self.drop_path1(self.ls1(attended))
        return self.token_reducer.reduce(self.block_index, x, evidence, state)


def attend(attention: Attention, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Evidence]:
    """The forward pass of timm's `Attention` that also hands out what scores and similarities are made of.

    Args:
        attention: with or without fused attention, query and key norm, output norm and gate.
        x: (batch, tokens, channels).
        bias: (batch, 1, 1, tokens) added to the logits, or None.

    Returns:
        output (batch, tokens, channels), and the evidence.
    """
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, head_dim) each
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout)
    else:
        logits = (queries * attention.scale) @ keys.transpose(-2, -1)
        logits = logits if bias is None else logits + bias
        out = attention.attn_drop(logits.softmax(dim=-1)) @ values
    out = attention.norm(out.transpose(1, 2).reshape(batch, tokens, -1))
    gate = getattr(attention, "gate", None)  # since timm 1.0.2x
    if gate is not None:
        out = out * gate(x).sigmoid()
    out = attention.proj_drop(attention.proj(out))
    return out, Evidence(queries, keys, values, attention.scale, bias)


def _mean_weights(size: Tensor, start: int) -> Tensor:
    """Factors (batch, tokens, 1) that turn the plain mean of the tokens from `start` on into the weighted
    one.
    """
    counted = size[:, start:]
    weights = torch.cat(
        [torch.ones_like(size[:, :start]), counted / counted.mean(dim=1, keepdim=True)], dim=1
    )
    return weights.unsqueeze(-1)
