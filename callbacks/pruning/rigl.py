"""RigL: sparse from the first step to the last, with a topology that moves."""

from typing import Any, ClassVar, Literal, TypeAlias

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.pruning.base import PruningCallback
from callbacks.pruning.criteria import keep_largest, random_mask
from callbacks.pruning.distributions import FixedDistribution, layer_densities, linear_layers
from callbacks.pruning.growth import Apply, move_weights
from callbacks.pruning.schedules import Timetable, drop_fraction_at
from lightning_modules.parts.options import check_choice, check_range
from lightning_modules.parts.reproducibility import derived_seed, run_seed

InitialMasks: TypeAlias = Literal["random", "magnitude"]


class RigL(PruningCallback):
    """The rigged lottery ("Rigging the Lottery: Making All Tickets Winners", Evci et al., ICML 2020).

    The network starts with masks of the target sparsity. At every update each layer drops its smallest
    weights and grows as many where the dense gradient is largest.

    Example:
        >>> trainer = Trainer(callbacks=[RigL(target_sparsity=0.9)], max_epochs=100)

    Args:
        target_sparsity: share of zeros among the selected weights, in [0, 1).
        topology_end: share of the run after which the masks are fixed.
        drop_fraction: share of a layer's weights that moves, at the start; falls along a half cosine.
        distribution: `erk`, `uniform` (first layer dense) or `uniform_all`.
        initial_masks: `random` as published, for random weights; `magnitude` for pretrained ones.
        apply: `growth_only` as published (an update replaces the optimiser's step) or `step` (both).
        ignore_linear: `uniform` leaves linear layers dense.
        options: of `PruningCallback`.
    """

    log_as: ClassVar[str] = "rigl"

    def __init__(
        self,
        target_sparsity: float,
        *,
        topology_end: float = 0.75,
        drop_fraction: float = 0.3,
        distribution: FixedDistribution = "erk",
        initial_masks: InitialMasks = "random",
        apply: Apply = "growth_only",
        ignore_linear: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(target_sparsity, **options)
        check_range("topology_end", topology_end, "(0, 1]")
        check_range("drop_fraction", drop_fraction, "[0, 1)")
        check_choice("distribution", distribution, FixedDistribution)
        check_choice("initial_masks", initial_masks, InitialMasks)
        check_choice("apply", apply, Apply)
        self.topology_end = topology_end
        self.drop_fraction = drop_fraction
        self.distribution = distribution
        self.initial_masks = initial_masks
        self.apply = apply
        self.ignore_linear = ignore_linear

    def timetable(self, total_steps: int) -> Timetable:
        """Moves until `topology_end`; the density never changes."""
        end = int(self.topology_end * total_steps + 1e-6)
        if end <= self.update_every:
            raise MisconfigurationException(
                f"The run of {total_steps} optimiser steps is too short for update_every={self.update_every} "
                f"and topology_end={self.topology_end}: the first update must come before step {end}. "
                "Train longer, or lower update_every."
            )
        return Timetable(total_steps, self.update_every, 0, end)

    def densities(self) -> dict[str, float]:
        """Density of every layer."""
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        dense = linear_layers(self.layers) if self.ignore_linear else []
        return layer_densities(self.distribution, shapes, self.final_density, dense)

    def start(self) -> None:
        """Masks of the target density: random ones are a function of the run's seed and the layer's name."""
        for name, density in self.densities().items():
            weight = self.weights[name]
            count = round(density * weight.numel())
            if self.initial_masks == "random":
                self.masks[name] = random_mask(weight.shape, count, derived_seed(run_seed(), "rigl", name))
            else:
                self.masks[name] = keep_largest(weight.detach().abs().float(), count)
        self.state.settled = True

    def update(self, due: int, gradients: dict[str, Tensor]) -> bool:
        """Drop and grow."""
        move_weights(self.masks, self.weights, gradients, self.drop_fraction_now(), self.densities())
        return self.apply == "growth_only"

    def drop_fraction_now(self) -> float:
        """`drop_fraction/2 (1 + cos(pi step / topology_end_step))`."""
        return drop_fraction_at(self.step, self.plan.topology_end_step, self.drop_fraction)

    def log_values(self) -> dict[str, float]:
        """Drop fraction."""
        return {"drop_fraction": self.drop_fraction_now()}

    def target_density(self) -> float:
        """Of all weights together; `uniform` keeps layers dense."""
        sizes = {name: weight.numel() for name, weight in self.weights.items()}
        alive = sum(density * sizes[name] for name, density in self.densities().items())
        return alive / sum(sizes.values())

    def configuration(self) -> dict[str, Any]:
        """What the schedule depends on."""
        return super().configuration() | {
            "topology_end": self.topology_end,
            "drop_fraction": self.drop_fraction,
            "distribution": self.distribution,
            "initial_masks": self.initial_masks,
            "apply": self.apply,
            "ignore_linear": self.ignore_linear,
        }
