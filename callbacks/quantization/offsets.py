"""Rounding offsets and both ends of each group's range are learned, the integers recomputed (AutoRound).

q = clamp(round(W / s + V) + z) with V in [-0.5, 0.5], and s and z from the ends of the group's range, each
shrunk by a factor of its own. What `rounding` freezes, the floor of the first grid, moves along here. One
fused function does forward and backward of a layer; its gradient is written out, because that of `clamp` is
zero at the bound, where the factors start.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from callbacks.quantization.grid import Grid, grid_between, grouped, range_of, to_integers

SMALLEST_END = 0.05
"""Share of its first range that a group keeps at least."""


class _OffsetWeight(torch.autograd.Function):
    """(clamp(round(W / s + V) + z) - z) s; rounding passes gradients on, the ends of the grid stop them."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, offset: Tensor, bottom: Tensor, top: Tensor, bits: int, symmetric: bool
    ) -> Tensor:
        grid = grid_between(bottom, top, bits, symmetric)
        step, zero_point = grid.scale[..., None], grid.zero_point[..., None]
        groups = grid.scale.shape[1]
        rounded = (grouped(weight, groups) / step).add_(grouped(offset, groups)).round_()
        centred = torch.clamp(rounded, grid.low - zero_point, grid.high - zero_point)
        inside = rounded == centred
        ctx.save_for_backward(weight, centred, inside, grid.scale, bottom)
        ctx.levels, ctx.symmetric = grid.high if symmetric else grid.high - grid.low, symmetric
        return (centred * step).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, centred, inside, scale, bottom = ctx.saved_tensors
        gradient = grouped(gradients[0], scale.shape[1])
        passed = gradient * inside
        to_bottom, to_top = None, None
        if ctx.needs_input_grad[3]:
            linear = torch.linalg.vecdot(passed, grouped(weight, scale.shape[1]))
            to_scale = torch.linalg.vecdot(gradient, centred) - linear / scale
            if not ctx.symmetric:
                # a zero point moves what is clipped: z = -bottom / s
                to_zero = scale * (passed.sum(2) - gradient.sum(2))
                to_scale += to_zero * bottom / scale.square()
                to_bottom = -to_scale / ctx.levels - to_zero / scale
            to_top = to_scale / ctx.levels
        to_offset = passed.mul_(scale[..., None]).flatten(1) if ctx.needs_input_grad[1] else None
        return None, to_offset, to_bottom, to_top, None, None


class LearnedOffset(nn.Module):
    """Everything that is learned about one weight matrix: an offset for each weight, the ends of each range.

    Untrained, the weight is round-to-nearest on the min-max grid.

    Args:
        weight: (d_out, d_in); kept as it is, without a copy where it is float32.
        bits: 2..8.
        group_size: columns that share a range; -1 is the row.
        symmetric: see `fit_grid`; then a range has one end.
        rank: `full` learns the offsets, 0 the ranges only.
        learn_ends: whether the ends are trained.
    """

    hard = True  # the forward pass always rounds

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group_size: int = -1,
        symmetric: bool = False,
        rank: Literal["full", 0] = "full",
        learn_ends: bool = True,
    ) -> None:
        super().__init__()
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        weight = weight.detach()
        self._weight = weight if weight.dtype == torch.float64 else weight.float()
        self._bottom, self._top = range_of(self._weight, group_size, symmetric)
        self.offset = nn.Parameter(torch.zeros_like(self._weight), requires_grad=rank == "full")
        self.high_end = nn.Parameter(torch.ones_like(self._top), requires_grad=learn_ends)
        self.low_end: nn.Parameter | None = None
        if not symmetric:
            self.low_end = nn.Parameter(torch.ones_like(self._top), requires_grad=learn_ends)

    def _ends(self) -> tuple[Tensor, Tensor]:
        bottom = self._bottom if self.low_end is None else self._bottom * self.low_end
        return bottom, self._top * self.high_end

    def forward(self) -> Tensor:
        """The quantized weight (d_out, d_in)."""
        return _OffsetWeight.apply(self._weight, self.offset, *self._ends(), self.bits, self.symmetric)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.offset.numel()

    def rounding_parameters(self) -> list[nn.Parameter]:
        """The offsets, or nothing."""
        return [self.offset] if self.offset.requires_grad else []

    def step_parameters(self) -> list[nn.Parameter]:
        """The factors of the ranges' ends."""
        ends = [self.high_end] if self.low_end is None else [self.low_end, self.high_end]
        return [end for end in ends if end.requires_grad]

    @torch.no_grad()
    def clamp_steps(self) -> None:
        """Keep offsets and ends in their ranges after an optimiser step."""
        self.offset.clamp_(-0.5, 0.5)
        for end in self.step_parameters():
            end.clamp_(SMALLEST_END, 1)

    @torch.no_grad()
    def grid(self) -> Grid:
        """The present grid."""
        return grid_between(*self._ends(), self.bits, self.symmetric)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """The integers (d_out, d_in), int16."""
        return to_integers(self._weight, self.grid(), self.offset).to(torch.int16)

    @torch.no_grad()
    def changed(self) -> float:
        """Share of the weights that are not at the nearest point of the present grid."""
        grid = self.grid()
        nearest = to_integers(self._weight, grid)
        return float((to_integers(self._weight, grid, self.offset) != nearest).double().mean())
