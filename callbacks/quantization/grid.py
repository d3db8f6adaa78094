"""Uniform grids for weights and activations: scales, zero points, integers. Every rounding is half to even.

Weights are matrices (d_out, d_in) that are cut into groups along d_in; a group of -1 is the whole row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_STEP = 1e-8


@dataclass(frozen=True)
class Grid:
    """The integers of a matrix's groups and what they stand for: W = (q - zero_point) * scale.

    Attributes:
        scale: (d_out, groups), the step s, positive.
        zero_point: (d_out, groups), float with integer values; 0 where symmetric.
        low: smallest integer.
        high: largest integer.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer: two's complement where symmetric, unsigned otherwise."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def grouped(matrix: Tensor, groups: int) -> Tensor:
    """(d_out, d_in) as (d_out, groups, d_in / groups), without a copy."""
    return matrix.unflatten(1, (groups, -1))


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of `columns` weights.

    Raises:
        ValueError: `group_size` does not divide `columns`.
    """
    if group_size == -1:
        return 1
    if group_size < 1 or columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide d_in = {columns}.")
    return columns // group_size


def fit_grid(weight: Tensor, bits: int, group_size: int = -1, symmetric: bool = False) -> Grid:
    """The min-max grid of a matrix (spec 2.2).

    Args:
        weight: (d_out, d_in).
        bits: 2..8.
        group_size: columns that share a step; -1 is the whole row.
        symmetric: zero point 0 and the range of two's complement; otherwise minimum and maximum (and 0) are
            on the grid.

    Raises:
        ValueError: `group_size` does not divide d_in.
    """
    return grid_between(*range_of(weight, group_size, symmetric), bits, symmetric)


def range_of(weight: Tensor, group_size: int = -1, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Both ends of the range of each group, (d_out, groups): 0 lies in it; symmetric ones have no lower end.

    Raises:
        ValueError: `group_size` does not divide d_in.
    """
    groups = grouped(weight, group_count(weight.shape[1], group_size))
    if symmetric:
        top = groups.abs().amax(2)
        return torch.zeros_like(top), top
    return groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)


def grid_between(bottom: Tensor, top: Tensor, bits: int, symmetric: bool = False) -> Grid:
    """The grid of ranges, see `range_of`."""
    low, high = integer_range(bits, symmetric)
    scale = ((top if symmetric else top - bottom) / high).clamp_min(SMALLEST_STEP)
    if symmetric:
        return Grid(scale, torch.zeros_like(scale), low, high)
    return Grid(scale, (-bottom / scale).round().clamp(low, high), low, high)


def to_integers(weight: Tensor, grid: Grid, offset: Tensor | None = None) -> Tensor:
    """Nearest integers of a matrix on a grid: (d_out, d_in), float with integer values.

    Args:
        weight: (d_out, d_in).
        grid: of its groups.
        offset: (d_out, d_in), added in steps before rounding.
    """
    groups = grouped(weight, grid.scale.shape[1])
    scale, zero_point = grid.scale[..., None], grid.zero_point[..., None]
    scaled = groups / scale
    if offset is not None:
        scaled = scaled + grouped(offset, grid.scale.shape[1])
    return (scaled.round() + zero_point).clamp(grid.low, grid.high).flatten(1)


def from_integers(integers: Tensor, grid: Grid) -> Tensor:
    """The weights (d_out, d_in) that integers stand for."""
    groups = grouped(integers, grid.scale.shape[1])
    return ((groups - grid.zero_point[..., None]) * grid.scale[..., None]).flatten(1)
