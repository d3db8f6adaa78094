"""What every rule for compressing the tokens of a block has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from callbacks.token_reduction.merge import merge, merge_sources, take
from callbacks.token_reduction.pairing import Plan, pair_tokens, removable
from callbacks.token_reduction.score import at_least_float32
from callbacks.token_reduction.state import Evidence, TokenState


class Reducer(ABC):
    """What a compressing block does to its tokens between attention and MLP; without state of its own."""

    needs_class_token: bool

    @abstractmethod
    def keeps(self, tokens: int, prefix: int) -> int:
        """Tokens that leave the block when `tokens` enter it, of which `prefix` are not patches."""

    @abstractmethod
    def reduce(self, block: int, x: Tensor, evidence: Evidence, state: TokenState) -> Tensor:
        """Remove tokens.

        Args:
            block: index of the block, for the record.
            x: (batch, tokens, channels) after the attention's residual.
            evidence: of the attention that was just computed.
            state: of the forward pass; sizes and sources are updated.

        Returns:
            (batch, keeps(tokens), channels).
        """


class PlannedReducer(Reducer):
    """A rule that lays out positions first, and then gathers and merges: what ToMe and PPT share.

    Attributes:
        r: tokens to remove, at most half of the patches.
    """

    r: int

    @abstractmethod
    def plan(
        self, evidence: Evidence, state: TokenState, removed: int
    ) -> tuple[Plan, Tensor | None, Tensor | None]:
        """Positions, without a gradient.

        Args:
            evidence: of the attention.
            state: of the forward pass, read only.
            removed: tokens to remove, possible and above 0.

        Returns:
            the plan; who pools (batch,) and the dispersion of the scores (batch,), each None where not known.
        """

    def keeps(self, tokens: int, prefix: int) -> int:
        """Tokens that leave the block."""
        return tokens - removable(tokens, prefix, self.r)

    def reduce(self, block: int, x: Tensor, evidence: Evidence, state: TokenState) -> Tensor:
        """Carry out the plan; the gradient flows through the tokens, not through the choice."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            removed = x.shape[1] - self.keeps(x.shape[1], state.prefix)
            plan, pooled, variance = self.plan(evidence, state, removed)
        sources = merge_sources(state.traced(x), plan) if state.trace else None
        if plan.merged is None and state.size is None:
            x = take(x, plan.kept)  # nothing was ever merged: all sizes are 1, and attention needs no bias
        else:
            x, size = merge(x, state.sizes(x), plan)
            state.resize(size, x)
        state.sources = sources
        state.record(block, x.shape[1], pooled, variance)
        return x


def pair_similar(evidence: Evidence, removed: int, prefix: int) -> Plan:
    """Pair the tokens whose keys, averaged over the heads, point the same way."""
    keys = evidence.keys
    return pair_tokens(keys.mean(dim=1, dtype=at_least_float32(keys.dtype)), removed, prefix)


def check_count(name: str, value: int) -> None:
    """Refuse a number of tokens below 0."""
    if value < 0:
        raise ValueError(f"{name} must not be negative, but is {value}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but is {value!r}.")
