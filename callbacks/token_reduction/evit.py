"""EViT: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800."""

from typing import Any

from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.keep_attentive import KeepAttentive
from callbacks.token_reduction.reducer import Reducer


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
