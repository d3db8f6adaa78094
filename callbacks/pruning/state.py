"""Where a run of pruning stands: masks, timetable and counters, as a checkpoint holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from callbacks.pruning.masks import MaskBook
from callbacks.pruning.schedules import Timetable


@dataclass
class PruningState:
    """One run's masks, and how far it has got.

    Attributes:
        masks: over the weights.
        plan: when the masks change.
        step: of the weights' optimiser, the present one included.
        due: step of an update that waits for finite gradients.
        settled: whether the target density has been reached once.
        history: rows of step, density and drop fraction: the start, then one an update.
    """

    masks: MaskBook
    plan: Timetable
    step: int = 0
    due: int | None = None
    settled: bool = False
    history: list[list[float]] = field(default_factory=list)

    def note(self, density: float, drop_fraction: float) -> None:
        """Add a row to the history."""
        self.history.append([self.step, density, drop_fraction])

    def as_dict(self, configuration: dict[str, Any]) -> dict[str, Any]:
        """Plain values and packed bits.

        Args:
            configuration: the settings that the schedule depends on.
        """
        return {
            "masks": self.masks.state_dict(),
            "step": self.step,
            "due": self.due,
            "settled": self.settled,
            "timetable": self.plan.as_dict(),
            "configuration": configuration,
            "history": [list(row) for row in self.history],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> "PruningState":
        """The opposite of `as_dict`.

        Raises:
            ValueError: the masks are of other weights; lists the differences.
        """
        masks = MaskBook(weights)
        masks.load_state_dict(saved["masks"])
        history = [list(row) for row in saved["history"]]
        plan = Timetable(**saved["timetable"])
        return cls(masks, plan, saved["step"], saved["due"], saved["settled"], history)


def changed_settings(saved: Mapping[str, Any], present: Mapping[str, Any], total_steps: int) -> list[str]:
    """What a resumed run was asked for and does not get, `option=value (saved: value)` each.

    Args:
        saved: see `PruningState.as_dict`.
        present: the configuration now.
        total_steps: of the run now.
    """
    before = saved["configuration"] | {"total_steps": saved["timetable"]["total_steps"]}
    now = {**present, "total_steps": total_steps}
    return [f"{key}={now[key]} (saved: {before.get(key)})" for key in now if now[key] != before.get(key)]
