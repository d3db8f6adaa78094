"""GPTQ (Frantar et al., ICLR 2023): columns are rounded one after another, their error moves on to those that
follow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from callbacks.quantization.grid import Grid, fit_grid, from_integers, group_count


def gptq_integers(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = False,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> tuple[Tensor, Grid]:
    """Integers and grid of a matrix.

    Args:
        weight: (d_out, d_in).
        hessian: (d_in, d_in), 2 X^T X / rows of the layer's inputs; any positive factor gives the same.
        bits: 2..8.
        group_size: columns that share a step; -1 fits rows once.
        symmetric: see `fit_grid`.
        damp: share of the mean diagonal that is added to the diagonal.
        block: columns whose updates of the rest are put off and done at once.
        act_order: columns by falling diagonal of the Hessian, with grids fitted to the weights as they are
            (static groups, which stay contiguous). False: left to right, the grid of a group fitted to the
            updated weights when the group starts.

    Returns:
        (d_out, d_in) integers as float32, and their grid.

    Raises:
        ValueError: the Hessian is not positive definite for all the damping.
    """
    columns = weight.shape[1]
    work = weight.detach().float().clone()
    dead = hessian.diagonal() == 0
    work[:, dead] = 0
    groups = group_count(columns, group_size)
    static = fit_grid(work, bits, group_size, symmetric) if act_order or groups == 1 else None
    order = None
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian, work = hessian[order][:, order], work[:, order]
    inverse = _inverse_factor(hessian, damp)
    size = columns // groups
    grid = static or fit_grid(work[:, :size], bits, -1, symmetric)
    of_column = [int(place) // size for place in (range(columns) if order is None else order.tolist())]
    scales, zero_points = list(grid.scale.unbind(1)), list(grid.zero_point.unbind(1))
    integers = torch.empty_like(work)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(work[:, start:end])
        for column in range(start, end):
            if static is None and column % size == 0 and column:
                # what the pending updates of this block will make of the group's later columns
                ahead = work[:, column : column + size].clone()
                if column + size > end:
                    ahead[:, end - column :] -= errors @ inverse[start:end, end : column + size]
                fitted = fit_grid(ahead, bits, -1, symmetric)
                scales.append(fitted.scale[:, 0])
                zero_points.append(fitted.zero_point[:, 0])
            scale, zero_point = scales[of_column[column]], zero_points[of_column[column]]
            value = work[:, column]
            rounded = ((value / scale).round() + zero_point).clamp_(grid.low, grid.high)
            integers[:, column] = rounded
            error = (value - (rounded - zero_point) * scale) / inverse[column, column]
            work[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    if order is not None:
        integers = integers[:, order.argsort()]
    return integers, Grid(torch.stack(scales, 1), torch.stack(zero_points, 1), grid.low, grid.high)


def best_damp(
    weight: Tensor,
    hessian: Tensor,
    held_out: Tensor,
    damps: Sequence[float],
    options: tuple[int, int, bool],
    act_order: bool = False,
    rows: int = 128,
) -> float:
    """The damping whose weights err least on tokens that they were not fitted to.

    Args:
        weight: (d_out, d_in); rows do not depend on each other, so some of them are enough.
        hessian: (d_in, d_in) of the tokens that are fitted to.
        held_out: (d_in, d_in) of others.
        damps: candidates.
        options: bits, group size and symmetry.
        act_order: see `gptq_integers`.
        rows: at most so many are tried.
    """
    if len(damps) == 1:
        return damps[0]
    some = weight[:: -(-len(weight) // rows)].float()

    def error(damp: float) -> float:
        integers, grid = gptq_integers(some, hessian, *options, damp=damp, act_order=act_order)
        difference = from_integers(integers, grid) - some
        return float(((difference @ held_out) * difference).sum())

    return min(damps, key=error)


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse; inputs that never fire get a diagonal of one."""
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True).float()
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"GPTQ: the Hessian of a layer is not positive definite with damp {damp}: give more calibration "
            "tokens or a larger damp."
        ) from error
