"""What a ViT costs with fewer tokens, in multiply-accumulates of its matrix products (spec 2.9), and r for a
budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from callbacks.token_reduction.reducer import Reducer


@dataclass(frozen=True)
class VitShape:
    """The numbers that the cost of a ViT depends on.

    Attributes:
        tokens: that enter the first block, prefix included.
        dim: channels.
        depth: blocks.
        prefix: leading tokens that are not patches.
        attention_dim: heads times head_dim, 0 where it is `dim`.
        mlp_macs: of one token in one MLP.
        gated: whether the attention has an output gate.
        outside: MACs of patch embedding and heads.
    """

    tokens: int
    dim: int
    depth: int
    mlp_macs: int
    outside: int
    prefix: int = 1
    attention_dim: int = 0
    gated: bool = False

    @classmethod
    def of(cls, network: VisionTransformer) -> "VitShape":
        """Shape of a timm ViT at the image size that it was made for."""
        patches = network.patch_embed.num_patches
        block = cast(Block, network.blocks[0])
        attention = cast(Attention, block.attn)
        heads = [network.head, getattr(network, "head_dist", None)]
        return cls(
            tokens=patches + network.num_prefix_tokens,
            dim=network.embed_dim,
            depth=len(network.blocks),
            mlp_macs=_linear_macs(block.mlp),
            outside=patches * network.patch_embed.proj.weight.numel()
            + sum(_linear_macs(head) for head in heads if head is not None),
            prefix=network.num_prefix_tokens,
            attention_dim=attention.num_heads * attention.head_dim,
            gated=getattr(attention, "gate", None) is not None,
        )

    def block_macs(self, entering: int, leaving: int) -> int:
        """MACs of a block whose attention sees `entering` tokens and whose MLP sees `leaving`."""
        attention_dim = self.attention_dim or self.dim
        projections = (5 if self.gated else 4) * self.dim * attention_dim
        return entering * projections + 2 * entering**2 * attention_dim + leaving * self.mlp_macs

    def macs(self, reducers: Mapping[int, Reducer] | None = None) -> int:
        """MACs of one image; scoring, matching and merging (under 0.2 % of a block) are not counted."""
        total, entering = self.outside, self.tokens
        for leaving in self.tokens_after_blocks(reducers or {}):
            total += self.block_macs(entering, leaving)
            entering = leaving
        return total

    def tokens_after_blocks(self, reducers: Mapping[int, Reducer]) -> list[int]:
        """Tokens that leave each block."""
        counts, tokens = [], self.tokens
        for index in range(self.depth):
            if index in reducers:
                tokens = reducers[index].keeps(tokens, self.prefix)
            counts.append(tokens)
        return counts


def smallest_r(shape: VitShape, target_macs: float, reducers: Callable[[int], Mapping[int, Reducer]]) -> int:
    """The smallest r, the same in every compressing block, whose MACs are not above a budget.

    Args:
        shape: of the network.
        target_macs: budget for one image.
        reducers: the reducers for an r.

    Raises:
        ValueError: no r is enough; names the budget and the fewest MACs that these blocks allow.
    """
    most = shape.tokens // 2
    for r in range(most + 1):
        if shape.macs(reducers(r)) <= target_macs:
            return r
    raise ValueError(
        f"target_macs={target_macs:.4g} cannot be reached: these compress_blocks leave at least "
        f"{shape.macs(reducers(most)):.4g} of {shape.macs():.4g} MACs. Compress in more or earlier blocks."
    )


def _linear_macs(module: nn.Module) -> int:
    """MACs of one token in all linear layers of a module."""
    return sum(
        layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)
    )
