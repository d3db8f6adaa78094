"""MagnitudePruning: cut the smallest weights, a few more at every update. The pattern for other structure
callbacks.
"""

from typing import Any, ClassVar

from torch import Tensor

from callbacks.pruning.base import PruningCallback
from callbacks.pruning.distributions import Distribution, linear_layers
from callbacks.pruning.gradual import GradualCut
from callbacks.pruning.schedules import Schedule, Timetable
from lightning_modules.parts.options import check_choice, check_range


class MagnitudePruning(PruningCallback):
    """Gradual magnitude pruning (Zhu and Gupta, 2017), over all layers together or layer by layer.

    Example:
        >>> callback = MagnitudePruning(target_sparsity=0.9, update_every=50)
        >>> trainer = Trainer(callbacks=[callback], max_epochs=10)

    Args:
        target_sparsity: share of zeros among the selected weights at the end, in [0, 1).
        prune_end: share of the run after which the target holds; the rest trains with fixed masks.
        distribution: `global` (one threshold for all layers), `erk`, `uniform` (first layer dense) or
            `uniform_all`.
        schedule: of the density: `cubic`, `exponential` or `cosine`.
        warmup: share of the cuts that do nothing yet, in [0, 1).
        ignore_linear: `uniform` leaves linear layers dense.
        options: of `PruningCallback`.
    """

    log_as: ClassVar[str] = "magnitude_pruning"

    def __init__(
        self,
        target_sparsity: float,
        *,
        prune_end: float = 0.75,
        distribution: Distribution = "global",
        schedule: Schedule = "cubic",
        warmup: float = 0.0,
        ignore_linear: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(target_sparsity, **options)
        check_range("prune_end", prune_end, "(0, 1]")
        check_range("warmup", warmup, "[0, 1)")
        check_choice("distribution", distribution, Distribution)
        check_choice("schedule", schedule, Schedule)
        self.prune_end = prune_end
        self.distribution = distribution
        self.schedule = schedule
        self.warmup = warmup
        self.ignore_linear = ignore_linear

    def timetable(self, total_steps: int) -> Timetable:
        """Cuts until `prune_end`, nothing after."""
        return Timetable.plan(total_steps, self.update_every, self.prune_end, topology_end=None)

    def cut(self) -> GradualCut:
        """The cut that the options describe."""
        dense = linear_layers(self.layers) if self.ignore_linear else []
        return GradualCut(
            self.distribution, self.schedule, self.final_density, self.warmup, self.weights, dense
        )

    def update(self, due: int, gradients: dict[str, Tensor]) -> bool:
        """Cut until the target is reached; the optimiser always steps."""
        self.cut_if_open(due)
        return False

    def cut_if_open(self, due: int) -> None:
        """Cut, unless the target has been reached once."""
        if not self.settled:
            self.cut()(self.masks, self.weights, due, self.plan)
            self.state.settled = self.plan.update_index(due) >= self.plan.updates_to_target

    def target_density(self) -> float:
        """Exact for all distributions; `uniform` and ERK may keep layers dense."""
        return self.cut().target_density(self.weights)

    def configuration(self) -> dict[str, Any]:
        """What the schedule depends on."""
        return super().configuration() | {
            "prune_end": self.prune_end,
            "distribution": self.distribution,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "ignore_linear": self.ignore_linear,
        }
