"""Rectangular assignment of many small problems: all at once on an accelerator, one by one on a CPU.

Shortest augmenting paths (Jonker and Volgenant), every problem a state machine of its own that takes one step
of its search, or of turning its path round, in each turn of one loop. Words whose cheapest patch nobody else
wants start matched. It is exact up to rounding, and nothing but one flag of every few turns goes to the host.
On a CPU, where a turn of all problems saves nothing, scipy's compiled solver is about ten times faster.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

TURNS = 8  # between two looks at whether all are done


def assign(score: Tensor, lengths: Tensor, capacity: int = 1) -> Tensor:
    """The patch of each word in the assignment of the largest sum, or -1.

    Args:
        score: (problems, patches, words), finite.
        lengths: valid words (problems,), the first ones.
        capacity: words that a patch takes at most.

    Returns:
        int64 (problems, words); -1 for words that are not valid, or that no patch was left for.
    """
    if score.device.type == "cpu":
        return _one_by_one(score.detach(), lengths, capacity)
    return assign_together(score, lengths, capacity)


def _one_by_one(score: Tensor, lengths: Tensor, capacity: int) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    score = score if score.dtype == torch.float64 else score.float()
    slots: Any = (
        score.nan_to_num().numpy().repeat(capacity, 1)
    )  # what is not finite is reported with the loss
    found = np.full((len(score), score.shape[2]), -1)
    for patch, each, count in zip(found, slots, lengths.tolist(), strict=True):
        slot, word = linear_sum_assignment(each[:, :count], maximize=True)
        patch[word] = slot // capacity
    return torch.from_numpy(found)


def assign_together(score: Tensor, lengths: Tensor, capacity: int = 1) -> Tensor:
    """`assign` of all problems in one loop, on any device."""
    problems, patches, words = score.shape
    cost = -score.detach().transpose(1, 2).repeat_interleave(capacity, 2)
    cost = cost.to(torch.float64 if score.dtype == torch.float64 else torch.float32)
    slots = patches * capacity
    if words > slots:  # places for those that go without: dearer than any detour
        dear = 2 * cost.abs().amax() * (words + 1) + 1
        cost = torch.cat([cost, dear.expand(problems, words, words - slots)], 2)
    slot = _Paths(cost, lengths).solve()
    return torch.where((slot >= 0) & (slot < slots), slot // capacity, -1)


class _Paths:
    """State of all problems: duals u (B, n) and v (B, m), matches, and the search that each is in."""

    def __init__(self, cost: Tensor, lengths: Tensor) -> None:
        self.cost = cost
        count, rows, columns = cost.shape
        device = cost.device
        self.problem = torch.arange(count, device=device)
        self.valid = torch.arange(rows, device=device) < lengths.unsqueeze(1)
        self.u, best = cost.min(2)
        self.v = cost.new_zeros(count, columns)
        place = torch.arange(rows, device=device).expand(count, rows)
        first = place.new_full((count, columns), rows).scatter_reduce(
            1, best, torch.where(self.valid, place, rows), "amin"
        )
        self.row_of = torch.where(first < rows, first, -1)
        owner = first.gather(1, best) == place
        self.column_of = torch.where(owner & self.valid, best, -1)
        self.distance = cost.new_full((count, columns), torch.inf)
        self.before = torch.full((count, columns), -1, device=device)
        self.seen = torch.zeros(count, columns, dtype=torch.bool, device=device)
        self.reached = cost.new_zeros(count)
        self.sink = torch.full((count,), -1, device=device)
        self.root = self.row = torch.zeros(count, dtype=torch.int64, device=device)
        self.active = torch.zeros(count, dtype=torch.bool, device=device)
        self._begin(torch.ones(count, dtype=torch.bool, device=device))

    def _begin(self, fresh: Tensor) -> None:
        free = self.valid & (self.column_of < 0)
        has, row = free.max(1)
        self.root = torch.where(fresh, row, self.root)
        self.row = torch.where(fresh, row, self.row)
        self.active = torch.where(fresh, has, self.active)
        self.distance.masked_fill_(fresh.unsqueeze(1), torch.inf)
        self.seen.masked_fill_(fresh.unsqueeze(1), False)
        self.reached.masked_fill_(fresh, 0)
        self.sink.masked_fill_(fresh, -1)

    def solve(self) -> Tensor:
        """The column of each row, (B, n); -1 where the row is not valid."""
        turn = 0
        while turn % TURNS or bool(self.active.any()):
            self._search()
            self._turn_round()
            turn += 1
        return self.column_of

    def _search(self) -> None:
        """One more column for those that look for a free one."""
        looking = self.active & (self.sink < 0)
        reduced = self.cost[self.problem, self.row] - self.u.gather(1, self.row[:, None]) - self.v
        through = self.reached[:, None] + reduced
        nearer = looking[:, None] & ~self.seen & (through < self.distance)
        self.distance = torch.where(nearer, through, self.distance)
        self.before = torch.where(nearer, self.row[:, None], self.before)
        reached, column = self.distance.masked_fill(self.seen, torch.inf).min(1)
        self.reached = torch.where(looking, reached, self.reached)
        step = torch.zeros_like(self.seen).scatter_(1, column[:, None], looking[:, None])
        self.seen |= step
        owner = self.row_of.gather(1, column[:, None])[:, 0]
        found = looking & (owner < 0)
        self.row = torch.where(looking & ~found, owner, self.row)
        self._update_duals(found)
        self.sink = torch.where(found, column, self.sink)

    def _update_duals(self, found: Tensor) -> None:
        gain = torch.where(
            self.seen & found[:, None], self.reached[:, None] - self.distance, torch.zeros_like(self.v)
        )
        self.v = self.v - gain
        self.u = self.u.scatter_add(1, self.row_of.clamp(min=0), gain * (self.row_of >= 0))
        root = torch.where(found, self.reached, torch.zeros_like(self.reached))
        self.u = self.u.scatter_add(1, self.root[:, None], root[:, None])

    def _turn_round(self) -> None:
        """One edge of the path of those that found a free column."""
        back = self.active & (self.sink >= 0)
        column = self.sink.clamp(min=0)[:, None]
        row = self.before.gather(1, column)
        row = torch.where(back[:, None], row, torch.zeros_like(row))
        held = self.column_of.gather(1, row)
        own = self.row_of.gather(1, column)
        self.row_of.scatter_(1, column, torch.where(back[:, None], row, own))
        self.column_of.scatter_(1, row, torch.where(back[:, None], column, held))
        self.sink = torch.where(back, held[:, 0], self.sink)
        self._begin(back & (row[:, 0] == self.root))
