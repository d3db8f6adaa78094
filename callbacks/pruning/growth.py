"""Dropping and regrowing within layers, as RPG and RigL do it."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from callbacks.pruning.criteria import drop_and_grow
from callbacks.pruning.masks import MaskBook

Apply: TypeAlias = Literal["step", "growth_only"]


def move_weights(
    masks: MaskBook,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    fraction: float,
    densities: Mapping[str, float] | None = None,
) -> None:
    """Move a fraction of each layer's weights to where the gradient is largest; counts do not change.

    Dense layers and layers without a gradient stay as they are.

    Args:
        masks: change in place.
        weights: by name; dead ones are 0.
        gradients: dense, by name; layers that the loss did not use may be missing.
        fraction: of the weights, see `schedules.drop_fraction_at`.
        densities: final densities of the layers where they are fixed: the fraction is then of the final
            count, and layers of density 1 are never touched. None takes it of the present count.
    """
    for name, weight in weights.items():
        alive = int(masks[name].sum())
        if name not in gradients or alive == weight.numel() or (densities and densities[name] >= 1):
            continue
        of = round(densities[name] * weight.numel()) if densities else alive
        moved = int(of * fraction)
        if moved:
            masks[name] = drop_and_grow(weight, gradients[name], masks[name], min(moved, alive))
