"""ToMe: Token Merging, arXiv 2210.09461: the most similar pairs merge."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.pairing import Plan
from callbacks.token_reduction.reducer import PlannedReducer, Reducer, check_count, pair_similar
from callbacks.token_reduction.state import Evidence, TokenState


@dataclass(frozen=True)
class MergeSimilar(PlannedReducer):
    """Every image merges its r most similar pairs; no score, hence no class token needed.

    Args:
        r: tokens to remove, at most half of the patches.

    Raises:
        ValueError: r is negative.
    """

    r: int

    needs_class_token = False

    def __post_init__(self) -> None:
        check_count("r", self.r)

    def plan(
        self, evidence: Evidence, state: TokenState, removed: int
    ) -> tuple[Plan, Tensor | None, Tensor | None]:
        """Pairs; there is nothing to choose."""
        return pair_similar(evidence, removed, state.prefix), None, None


class ToMe(TokenReduction):
    """Merge the r most similar token pairs in every block: PPT's pooling, for all images and all blocks.

    It has no score, so the network needs no class token. Its authors advise `proportional_attention: false`
    when a network is trained with it.

    Args:
        r: tokens to remove, in all compressing blocks or one number for each; at most half of the patches go.
        compress_blocks: 0-based indices of the blocks that merge tokens; None is every block, as published.
        proportional_attention: let attention count a token as often as its size.
        target_macs: budget of multiply-accumulates an image; the smallest r that meets it replaces `r`.
        kwargs: `target`, `stages`, `visualize`, `trace_source`, see `TokenReduction`.
    """

    name = "tome"

    def __init__(
        self,
        r: int | list[int] = 12,
        compress_blocks: list[int] | None = None,
        proportional_attention: bool = True,
        target_macs: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(compress_blocks, r, target_macs, proportional_attention, **kwargs)

    def reducer(self, position: int, blocks: int, r: int | None) -> Reducer:
        """`MergeSimilar` of this block."""
        return MergeSimilar(r or 0)
