"""Position tables of CLIP for images of another shape and captions of another length (section 2.1)."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic_antialias"]


def resize_grid(table: Tensor, grid: tuple[int, int], interpolation: Interpolation = "bilinear") -> Tensor:
    """A table (1 + g g, width) of a square grid for `grid` (rows, columns); the class row stays.

    Args:
        table: row 0 belongs to the class token, the others are row-major.
        grid: rows and columns.
        interpolation: `bilinear` is the authors' family's, `bicubic_antialias` open_clip's own.

    Raises:
        ValueError: the table is of no square grid.
    """
    if len(table) == 1 + grid[0] * grid[1]:
        return table
    side = math.isqrt(len(table) - 1)
    if side * side != len(table) - 1:
        raise ValueError(f"a position table of {len(table)} rows is of no square grid and a class token.")
    mode, antialias = ("bilinear", False) if interpolation == "bilinear" else ("bicubic", True)
    image = table[1:].T.reshape(1, -1, side, side).float()
    resized = F.interpolate(image, size=grid, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([table[:1], resized[0].flatten(1).T.to(table.dtype)])


def resize_length(table: Tensor, length: int) -> Tensor:
    """A table (n, width) of text positions for `length` positions, linearly interpolated."""
    if len(table) == length:
        return table
    resized = F.interpolate(table.T[None].float(), size=length, mode="linear", align_corners=False)
    return resized[0].T.to(table.dtype)


def fit_positions(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    grid: tuple[int, int],
    interpolation: Interpolation = "bilinear",
) -> dict[str, Tensor]:
    """CLIP's state with both position tables as long as in `own`.

    Args:
        state: tensors by open_clip's names.
        own: those of the model to load into.
        grid: rows and columns of the model's image tokens.
        interpolation: of the image positions.
    """
    fitted = dict(state)
    if (table := state.get("visual.positional_embedding")) is not None:
        fitted["visual.positional_embedding"] = resize_grid(table, grid, interpolation)
    if (table := state.get("positional_embedding")) is not None:
        fitted["positional_embedding"] = resize_length(table, len(own["positional_embedding"]))
    return fitted
