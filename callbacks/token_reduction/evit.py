"""EViT (Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800): the most attended tokens
stay, the others become one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.merge import take
from callbacks.token_reduction.pairing import prune, removable
from callbacks.token_reduction.reducer import Reducer, check_count
from callbacks.token_reduction.score import class_attention
from callbacks.token_reduction.state import Evidence, TokenState


@dataclass(frozen=True)
class KeepAttentive(Reducer):
    """EViT (arXiv 2202.07800): keep the patches that the class token attends to most, fuse the others into
    one.

    The fused token is the sum of the others weighted by their class attention (mean over the heads, not
    scaled to sum to 1, as in the authors' code) and is an ordinary patch token for the blocks that follow.

    Args:
        keep_rate: share of the patch tokens to keep, rounded up; used where `r` is None.
        r: tokens to remove, counting the fused one as kept, at most half of the patches.
        fuse: False drops the others.

    Raises:
        ValueError: keep_rate is not in (0, 1], or r is negative.
    """

    keep_rate: float = 0.7
    r: int | None = None
    fuse: bool = True

    needs_class_token = True

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], but is {self.keep_rate}.")
        if self.r is not None:
            check_count("r", self.r)

    def keeps(self, tokens: int, prefix: int) -> int:
        """Tokens that leave the block, the fused one included."""
        if self.r is not None:
            return tokens - removable(tokens, prefix, self.r)
        kept = prefix + math.ceil(self.keep_rate * (tokens - prefix))
        return kept + 1 if self.fuse and kept < tokens else kept

    def reduce(self, block: int, x: Tensor, evidence: Evidence, state: TokenState) -> Tensor:
        """Keep or fuse, see the class; the fused token passes gradients to the attention, as in the authors'
        code.
        """
        keep = self.keeps(x.shape[1], state.prefix) - state.prefix - int(self.fuse)
        with torch.autocast(x.device.type, enabled=False):
            attention = class_attention(evidence.queries, evidence.keys, evidence.scale, evidence.bias)
            attention = attention[:, state.prefix :] / evidence.queries.shape[1]  # (batch, patches)
        order = prune(attention.detach(), attention.shape[1], state.prefix)
        kept, others = order[:, : state.prefix + keep], order[:, state.prefix + keep :]
        reduced = take(x, kept)
        if self.fuse:
            weights = attention.gather(1, others - state.prefix).to(x.dtype)
            fused = (take(x, others) * weights.unsqueeze(-1)).sum(dim=1, keepdim=True)
            reduced = torch.cat([reduced, fused], dim=1)
        if state.trace:
            state.sources = self._united(state.traced(x), kept, others)
        if state.size is not None:  # a merging rule came before
            state.resize(self._united(state.size.unsqueeze(-1), kept, others).squeeze(-1), reduced)
        state.record(block, reduced.shape[1])
        return reduced

    def _united(self, rows: Tensor, kept: Tensor, others: Tensor) -> Tensor:
        """Rows (batch, tokens, anything) of the tokens that stay, and the sum of the others' for the fused
        one.
        """
        if not self.fuse:
            return take(rows, kept)
        return torch.cat(
            [take(rows, kept), take(rows, others).sum(dim=1, keepdim=True, dtype=rows.dtype)], dim=1
        )


class EViT(TokenReduction):
    """Keep the patches that the class token attends to most, and fuse the others into one token.

    Args:
        compress_blocks: 0-based indices of the blocks that remove tokens; None takes every block.
        keep_rate: share of the patch tokens that a block keeps, rounded up.
        r: tokens to remove instead (the fused one counts as kept), in all compressing blocks or one for each.
        target_macs: budget of multiply-accumulates an image; the smallest r that meets it replaces both.
        fuse: False drops the inattentive tokens.
        kwargs: `target`, `stages`, `visualize`, `trace_source`, see `TokenReduction`.
    """

    name = "evit"

    def __init__(
        self,
        compress_blocks: list[int] | None = [3, 6, 9],  # noqa: B006  (read only; jsonargparse shows it)
        keep_rate: float = 0.7,
        r: int | list[int] | None = None,
        target_macs: float | None = None,
        fuse: bool = True,
        **kwargs: Any,
    ) -> None:
        self.keep_rate = keep_rate
        self.fuse = fuse
        super().__init__(compress_blocks, r, target_macs, **kwargs)

    def reducer(self, position: int, blocks: int, r: int | None) -> Reducer:
        """`KeepAttentive` of this block."""
        return KeepAttentive(self.keep_rate, r, self.fuse)
