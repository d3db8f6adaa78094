"""PPT, arXiv 2310.01812: an image with flat scores pools similar tokens, one with peaked scores prunes."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.options import spread
from callbacks.token_reduction.pairing import Plan, choose, prune
from callbacks.token_reduction.reducer import PlannedReducer, Reducer, check_choice, check_count, pair_similar
from callbacks.token_reduction.score import Score, ThresholdMode, class_attention, dispersion, significance
from callbacks.token_reduction.state import Evidence, TokenState

Policy = Literal["adaptive", "prune", "pool", "reversed"]
Dispatch = Literal["both", "split"]


@dataclass(frozen=True)
class PruneOrPool(PlannedReducer):
    """PPT (spec 2.3 to 2.7): images with flat scores pool the most similar pairs, the others prune the
    lowest scores.

    Args:
        r: tokens to remove, at most half of the patches.
        threshold: the paper's tau: an image pools if the dispersion of its scores is below it; 0 always
            prunes, infinity always pools.
        policy: `adaptive` is the paper's; `reversed` prunes below the threshold; `prune` and `pool` do not
            decide.
        score: class attention times the norm of the value, or class attention alone.
        threshold_mode: what the threshold is compared with, see `score.dispersion`.
        dispatch: `both` lays out both ways for every image and selects, without waiting for the device;
            `split` asks once a block whether any image needs a way before it lays that out. The results are
            equal.

    Raises:
        ValueError: r is negative, the threshold is negative or not a number, or a choice is unknown.
    """

    r: int
    threshold: float = 7e-5
    policy: Policy = "adaptive"
    score: Score = "cls_attn_vnorm"
    threshold_mode: ThresholdMode = "variance"
    dispatch: Dispatch = "both"

    def __post_init__(self) -> None:
        check_count("r", self.r)
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be a number that is not negative, but is {self.threshold}.")
        check_choice("policy", self.policy, get_args(Policy))
        check_choice("score", self.score, get_args(Score))
        check_choice("threshold_mode", self.threshold_mode, get_args(ThresholdMode))
        check_choice("dispatch", self.dispatch, get_args(Dispatch))

    @property
    def settled(self) -> Literal["prune", "pool"] | None:
        """The way of every image where that is known beforehand."""
        if self.policy == "prune" or self.policy == "pool":
            return self.policy
        below, above = ("pool", "prune") if self.policy == "adaptive" else ("prune", "pool")
        if self.threshold == 0:
            return above  # type: ignore[return-value]
        return below if self.threshold == math.inf else None  # type: ignore[return-value]

    @property
    def needs_class_token(self) -> bool:  # type: ignore[override]
        """Pooling alone compares keys only."""
        return self.settled != "pool"

    def plan(
        self, evidence: Evidence, state: TokenState, removed: int
    ) -> tuple[Plan, Tensor | None, Tensor | None]:
        """Prune or pool, see the class."""
        settled, recording = self.settled, state.records is not None
        batch = evidence.keys.shape[0]
        if settled == "pool":
            pooled = evidence.keys.new_ones(batch, dtype=torch.bool) if recording else None
            return pair_similar(evidence, removed, state.prefix), pooled, None
        scores = self._scores(evidence, state.prefix)
        pruning = prune(scores, scores.shape[1] - removed, state.prefix)
        if settled == "prune":
            pooled = evidence.keys.new_zeros(batch, dtype=torch.bool) if recording else None
            return Plan(pruning), pooled, dispersion(scores, self.threshold_mode) if recording else None
        variance = dispersion(scores, self.threshold_mode)
        pooled = variance >= self.threshold if self.policy == "reversed" else variance < self.threshold
        if self.dispatch == "split" and not torch.compiler.is_compiling():
            pooling = int(pooled.sum())  # the one place where the host waits for the device
            if pooling == batch:
                return pair_similar(evidence, removed, state.prefix), pooled, variance
            if pooling == 0:
                return Plan(pruning), pooled, variance
        return choose(pooled, pruning, pair_similar(evidence, removed, state.prefix)), pooled, variance

    def _scores(self, evidence: Evidence, prefix: int) -> Tensor:
        """Significance (batch, patches), summing to 1."""
        attention = class_attention(evidence.queries, evidence.keys, evidence.scale, evidence.bias)
        return significance(attention, evidence.values if self.score == "cls_attn_vnorm" else None, prefix)


class TokenPruningPooling(TokenReduction):
    """PPT: in a few blocks every image either prunes its least attended tokens or pools its most similar
    ones.

    The defaults are the published setting for DeiT without fine-tuning; fine-tuned DeiT-S uses threshold
    6e-5.

    Args:
        compress_blocks: 0-based indices of the blocks that remove tokens; None takes every block.
        r: tokens to remove, in all compressing blocks or one number for each; at most half of the patches go.
        threshold: the paper's τ: images whose scores vary less pool, the others prune. It depends on the
            number of patches and on the model; 0 always prunes, infinity (`.inf`) always pools.
        policy: `adaptive`, `prune`, `pool` or `reversed` (prune below the threshold), for all or for each
            block.
        score: class attention times value norm, or class attention alone.
        threshold_mode: compare the `variance` of the scores, or `cv2`, the variance times patches squared.
        proportional_attention: after a merge, let attention count a token as often as its size.
        target_macs: budget of multiply-accumulates an image; the smallest r that meets it replaces `r`.
        dispatch: `both` needs no answer from the device and can be compiled and exported; `split` asks once
            a block and skips a way that no image of the batch takes.
        kwargs: `target`, `stages`, `visualize`, `trace_source`, see `TokenReduction`.
    """

    name = "ppt"

    def __init__(
        self,
        compress_blocks: list[int] | None = [3, 6, 9],  # noqa: B006  (read only; jsonargparse shows it)
        r: int | list[int] = 50,
        threshold: float = 7e-5,
        policy: Policy | list[Policy] = "adaptive",
        score: Score = "cls_attn_vnorm",
        threshold_mode: ThresholdMode = "variance",
        proportional_attention: bool = True,
        target_macs: float | None = None,
        dispatch: Dispatch = "both",
        **kwargs: Any,
    ) -> None:
        self.threshold = threshold
        self.policy = policy
        self.score = score
        self.threshold_mode = threshold_mode
        self.dispatch = dispatch
        super().__init__(compress_blocks, r, target_macs, proportional_attention, **kwargs)

    @property
    def decides(self) -> bool:
        """Images choose between pooling and pruning."""
        return True

    def reducer(self, position: int, blocks: int, r: int | None) -> Reducer:
        """`PruneOrPool` with the policy of this block."""
        policies: list[Policy] = spread("policy", self.policy, blocks)
        return PruneOrPool(
            r=r or 0,
            threshold=self.threshold,
            policy=policies[position],
            score=self.score,
            threshold_mode=self.threshold_mode,
            dispatch=self.dispatch,
        )
