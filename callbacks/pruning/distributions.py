"""How many weights each layer keeps, as densities that are fixed before training."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from torch import nn

Distribution: TypeAlias = Literal["global", "erk", "uniform", "uniform_all"]
FixedDistribution: TypeAlias = Literal["erk", "uniform", "uniform_all"]


def layer_densities(
    distribution: FixedDistribution,
    shapes: Mapping[str, Sequence[int]],
    density: float,
    dense: Sequence[str] = (),
) -> dict[str, float]:
    """Density of every layer under a fixed distribution.

    Args:
        distribution: `uniform_all` gives every layer `density`; `uniform` keeps the first layer (unless it is
            the only one) and those in `dense` whole; `erk` see `erk_densities`.
        shapes: weight shape by name, in module order.
        density: of the whole in (0, 1] (for `uniform`: of each layer that is not whole).
        dense: names of layers that `uniform` leaves whole.
    """
    if distribution == "erk":
        return erk_densities(shapes, density)
    densities = dict.fromkeys(shapes, density)
    if distribution == "uniform":
        first = next(iter(shapes))
        whole = set(dense) | ({first} if len(shapes) > 1 else set())
        densities.update(dict.fromkeys(whole, 1.0))
    return densities


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel densities (RigL; RPG, section 2.6).

    A layer's density is proportional to `sum(shape) / prod(shape)`, with one factor for all chosen so that
    the whole has `density`; layers that would exceed 1 are kept whole, and the rest shares what is left.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    scores = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    whole: set[str] = set()
    while len(whole) < len(shapes):
        open_names = [name for name in shapes if name not in whole]
        budget = sum(int(sizes[name] * density) for name in open_names)
        budget -= sum(int(sizes[name] * (1 - density)) for name in whole)
        factor = budget / sum(scores[name] * sizes[name] for name in open_names)
        largest = max(scores[name] for name in open_names)
        if factor * largest <= 1:
            return {name: 1.0 if name in whole else factor * scores[name] for name in shapes}
        whole.update(name for name in open_names if scores[name] == largest)
    return dict.fromkeys(shapes, 1.0)


def linear_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names whose module is a Linear."""
    return [name for name, module in modules.items() if isinstance(module, nn.Linear)]
