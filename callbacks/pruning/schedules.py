"""When to prune and how far: density over the run, and the share of weights that moves at an update."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

Schedule: TypeAlias = Literal["exponential", "cubic", "cosine"]


@dataclass(frozen=True)
class Timetable:
    """The fixed points of a run, in optimiser steps (RPG, section 2; the spec's T, Delta, S_prune, S_topo).

    Args:
        total_steps: optimiser steps of the whole run.
        update_every: steps between two updates of the masks.
        prune_end_step: the density reaches its target at the first update after this step.
        topology_end_step: from this step on, masks are fixed.
    """

    total_steps: int
    update_every: int
    prune_end_step: int
    topology_end_step: int

    @classmethod
    def plan(
        cls, total_steps: int, update_every: int, prune_end: float, topology_end: float | None
    ) -> "Timetable":
        """Turn fractions of the run into steps.

        Args:
            total_steps: optimiser steps of the run.
            update_every: steps between two updates.
            prune_end: fraction of the run after which the target density holds.
            topology_end: fraction of the run after which masks are fixed; None ends with the last cut.

        Raises:
            MisconfigurationException: the run is too short to reach the target; names the steps needed.
        """
        prune_end_step = _share(prune_end, total_steps)
        updates = prune_end_step // update_every
        settled = (updates + 1) * update_every
        if updates < 1 or settled > total_steps:
            raise MisconfigurationException(
                f"The run of {total_steps} optimiser steps is too short for update_every={update_every} and "
                f"prune_end={prune_end}: {_steps_needed(update_every, prune_end)}"
            )
        end = settled + 1 if topology_end is None else _share(topology_end, total_steps)
        if end <= settled:
            rank_zero_info(
                f"The target density is reached at step {settled}, so masks change until there, not only "
                f"until step {end} (topology_end={topology_end})."
            )
            end = settled + 1
        return cls(total_steps, update_every, prune_end_step, end)

    @property
    def updates_to_target(self) -> int:
        """Index of the update that reaches the target density (the spec's K)."""
        return self.prune_end_step // self.update_every

    def is_due(self, step: int) -> bool:
        """Whether masks change at optimiser step `step` (1 for the first)."""
        return step % self.update_every == 0 and step < self.topology_end_step

    def update_index(self, step: int) -> int:
        """Index, from 0, of the update that is due at `step`."""
        return step // self.update_every - 1

    def as_dict(self) -> dict[str, int]:
        """Plain numbers for a checkpoint."""
        return asdict(self)


def _share(fraction: float, steps: int) -> int:
    return int(fraction * steps + 1e-6)  # 0.7272... of 110 is 80, whatever the rounding


def _steps_needed(update_every: int, prune_end: float) -> str:
    if prune_end >= 1:
        return "no run is long enough, because one update comes after prune_end; lower prune_end."
    steps = update_every
    while (
        _share(prune_end, steps) < update_every
        or (_share(prune_end, steps) // update_every + 1) * update_every > steps
    ):
        steps += 1
    return f"it needs at least {steps} steps. Train longer, or lower update_every or prune_end."


def density_at(
    schedule: Schedule, target: float, step: int, timetable: Timetable, warmup: float = 0.0
) -> float:
    """Density (share of weights kept) that the update at `step` sets.

    Args:
        schedule: `exponential` and `cubic` go by the update's index, `cosine` by the step.
        target: final density in (0, 1].
        step: optimiser step of the update, a multiple of `update_every`.
        timetable: of the run.
        warmup: share of the updates that keep density 1 first; `cosine` takes it of `prune_end_step`.

    Returns:
        1 at the first update, falling to exactly `target` at update `updates_to_target`.
    """
    if schedule == "cosine":
        return cosine_density(target, step, timetable.prune_end_step, warmup)
    law = exponential_density if schedule == "exponential" else cubic_density
    return law(target, timetable.update_index(step), timetable.updates_to_target, warmup)


def exponential_density(target: float, update: int, updates: int, warmup: float = 0.0) -> float:
    """`target ** (update / updates)`; `target` from `update == updates` on (RPG, section 2.4)."""
    update, updates = _after_warmup(update, updates, warmup)
    if update >= updates:
        return target
    return math.pow(math.pow(target, 1 / updates), update)


def cubic_density(target: float, update: int, updates: int, warmup: float = 0.0) -> float:
    """`target + (1 - target) (1 - update / updates)^3`, the law of Zhu and Gupta (2017)."""
    update, updates = _after_warmup(update, updates, warmup)
    if update >= updates:
        return target
    return target + (1 - target) * (1 - update / updates) ** 3


def cosine_density(target: float, step: int, end_step: int, warmup: float = 0.0) -> float:
    """`target + (1 - target)/2 (1 + cos(pi step / end_step))` before `end_step`, then `target`."""
    step, end_step = _after_warmup(step, end_step, warmup)
    if step >= end_step:
        return target
    return target + (1 - target) / 2 * (1 + math.cos(math.pi * step / end_step))


def _after_warmup(position: int, end: int, warmup: float) -> tuple[int, int]:
    """Position and end counted from the end of the warm-up (at least one position is left to prune in)."""
    skipped = min(round(end * warmup), end - 1)
    return max(position - skipped, 0), end - skipped


def drop_fraction_at(step: int, end_step: int, start: float) -> float:
    """Share of a layer's active weights that is dropped and regrown at `step`.

    `start/2 (1 + cos(pi step / end_step))`: the RigL law, which RPG shares (section 2.5).
    """
    if step >= end_step:
        return 0.0
    return start / 2 * (1 + math.cos(math.pi * step / end_step))
