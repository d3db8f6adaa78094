"""TokenPruningPooling: PPT, arXiv 2310.01812."""

from typing import Any

from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.options import spread
from callbacks.token_reduction.prune_or_pool import Dispatch, Policy, PruneOrPool
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.score import Score, ThresholdMode


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
