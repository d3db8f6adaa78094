"""ToMe's rule: the most similar pairs merge (arXiv 2210.09461)."""

from dataclasses import dataclass

from torch import Tensor

from callbacks.token_reduction.matching import Plan
from callbacks.token_reduction.reducer import PlannedReducer, check_count, pair_similar
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
