"""GPTQ (Frantar et al., ICLR 2023): columns are rounded left to right, their error moves on to those that
follow.
"""

import torch
from torch import Tensor

from callbacks.quantization.grid import Grid, fit_grid, group_count


def gptq_integers(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = False,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Grid]:
    """Integers and grid of a matrix, left to right without reordering.

    Args:
        weight: (d_out, d_in).
        hessian: (d_in, d_in), 2 X^T X / rows of the layer's inputs; any positive factor gives the same.
        bits: 2..8.
        group_size: the grid of a group is fitted to the updated weights when the group starts; -1 fits rows
            once.
        symmetric: see `fit_grid`.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns whose updates of the rest are put off and done at once.

    Returns:
        (d_out, d_in) integers as float32, and their grid.

    Raises:
        ValueError: the Hessian is not positive definite for all the damping.
    """
    columns = weight.shape[1]
    work = weight.detach().float().clone()
    inverse, dead = _inverse_factor(hessian, damp)
    work[:, dead] = 0
    groups = group_count(columns, group_size)
    size = columns // groups
    grid = fit_grid(work, bits, -1, symmetric)
    scales, zero_points = [], []
    integers = torch.empty_like(work)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(work[:, start:end])
        for column in range(start, end):
            if column % size == 0:
                if groups > 1:
                    # what the pending updates of this block will make of the group's later columns
                    ahead = work[:, column : column + size].clone()
                    if column + size > end:
                        ahead[:, end - column :] -= errors @ inverse[start:end, end : column + size]
                    grid = fit_grid(ahead, bits, -1, symmetric)
                scales.append(grid.scale)
                zero_points.append(grid.zero_point)
            value = work[:, column : column + 1]
            rounded = ((value / grid.scale).round() + grid.zero_point).clamp_(grid.low, grid.high)
            integers[:, column : column + 1] = rounded
            error = (value - (rounded - grid.zero_point) * grid.scale) / inverse[column, column]
            work[:, column:end] -= error * inverse[column, column:end]
            errors[:, column - start : column - start + 1] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return integers, Grid(torch.cat(scales, 1), torch.cat(zero_points, 1), grid.low, grid.high)


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the damped inverse, and which inputs never fire."""
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damp * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"GPTQ: the Hessian of a layer is not positive definite with damp {damp}: give more calibration "
            "tokens or a larger damp."
        ) from error
    return factor.float(), dead
