"""The grid search of a step: the candidate whose output is nearest to the layer's own, weighted by gradients.

What is minimised is the sum over calibration samples of the mean of (g (O - O'))^2 (spec 2.5). It is a sum
of terms that are not negative, so a candidate whose sum over some of the samples exceeds another's sum over
all of them cannot win: it is left out of the rest. The result is that of trying every candidate on every
sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")

BATCH_ELEMENTS = 2**21
"""Elements of the outputs of the candidates that are tried at once."""


@dataclass(frozen=True)
class Grid(Generic[Chunk]):
    """Candidates on parts of the calibration set.

    Attributes:
        chunks: parts of the set.
        errors: `(chunk, numbers of some candidates) -> (candidates, groups)` sums over the chunk.
        size: elements of the outputs of one candidate on a chunk.
        every: try every candidate on every chunk; for comparison only.
    """

    chunks: Sequence[Chunk]
    errors: Callable[[Chunk, Tensor], Tensor]
    size: Callable[[Chunk], int]
    every: bool = False

    def _sums(self, chunk: Chunk, numbers: Tensor) -> Tensor:
        at_once = max(1, BATCH_ELEMENTS // max(1, self.size(chunk)))
        return torch.cat([self.errors(chunk, part).double() for part in numbers.split(at_once)])

    def best(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The number of the best candidate of each group, the first of equals, and its sum of errors.

        Args:
            count: how many candidates there are.
            device: of the numbers.

        Returns:
            (groups,) int64 and (groups,) float64.
        """
        alive = torch.arange(count, device=device)
        first, *rest = self.chunks
        sums = self._sums(first, alive)
        done: Tensor | None = None
        if rest and not self.every:
            leaders = sums.argmin(0).unique()
            full = sums[leaders]
            for chunk in rest:
                full = full + self._sums(chunk, leaders)
            bound = full.amin(0)
            done = leaders
            alive = alive[~torch.isin(alive, leaders)]
        for chunk in rest:
            if done is not None:
                alive = alive[(sums[alive] <= bound).any(1)]
            if not len(alive):
                break
            sums[alive] += self._sums(chunk, alive)
        if done is not None:
            left_out = torch.ones(count, dtype=torch.bool, device=device)
            left_out[alive] = False
            sums[left_out] = torch.inf
            sums[done] = full
        values = sums.amin(0)
        order = torch.arange(count, 0, -1, device=device)[:, None]
        return ((sums == values) * order).argmax(0), values  # the first of equals


def candidate_steps(base: Tensor, lowest: float = 0.01, highest: float = 1.2, count: int = 100) -> Tensor:
    """(count, *base.shape): base (lowest + i (highest - lowest) / count), without the highest itself."""
    factors = lowest + torch.arange(count, device=base.device) * (highest - lowest) / count
    return base * factors.to(base.dtype).view(-1, *(1,) * base.ndim)
