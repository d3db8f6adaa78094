"""The gradual cut: how many weights are left at an update, globally or layer by layer."""

from collections.abc import Mapping

from torch import Tensor

from callbacks.pruning.criteria import global_magnitude_masks, keep_largest
from callbacks.pruning.distributions import Distribution, layer_densities
from callbacks.pruning.masks import MaskBook
from callbacks.pruning.schedules import Schedule, Timetable, density_at


class GradualCut:
    """Cuts the smallest weights down to the density of a schedule; never revives one.

    Args:
        distribution: `global` compares all weights with one threshold; the others fix each layer's density.
        schedule: see `schedules.density_at`.
        target: final density.
        warmup: share of the updates that do not cut yet.
        weights: by name, in module order.
        dense: names that the `uniform` distribution leaves whole.
    """

    def __init__(
        self,
        distribution: Distribution,
        schedule: Schedule,
        target: float,
        warmup: float,
        weights: Mapping[str, Tensor],
        dense: list[str],
    ) -> None:
        self.schedule = schedule
        self.target = target
        self.warmup = warmup
        self.densities: dict[str, float] | None = None
        if distribution != "global":
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            self.densities = layer_densities(distribution, shapes, target, dense)

    def target_density(self, weights: Mapping[str, Tensor]) -> float:
        """Density of all weights together at the end."""
        if self.densities is None:
            return self.target
        alive = sum(self.densities[name] * weight.numel() for name, weight in weights.items())
        return alive / sum(weight.numel() for weight in weights.values())

    def __call__(self, masks: MaskBook, weights: Mapping[str, Tensor], due: int, plan: Timetable) -> None:
        """Cut to the density of the update that was due at step `due`; masks change in place.

        The global cut also zeroes the weights, so that what it takes can only regrow from 0; under a fixed
        distribution what regrows at once keeps its value (RPG, section 2.5).
        """
        if self.densities is None:
            density = density_at(self.schedule, self.target, due, plan, self.warmup)
            for name, mask in global_magnitude_masks(weights, density).items():
                masks[name] = mask
            masks.apply(weights)
        else:
            for name, final in self.densities.items():
                if final < 1:
                    density = density_at(self.schedule, final, due, plan, self.warmup)
                    masks[name] = self._largest(weights[name], masks[name], density)

    @staticmethod
    def _largest(weight: Tensor, alive: Tensor, density: float) -> Tensor:
        magnitude = weight.detach().abs().float().masked_fill(~alive, -1)
        return keep_largest(magnitude, int(density * weight.numel() + 1e-6))
