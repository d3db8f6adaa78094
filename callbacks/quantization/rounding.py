"""LoRA-Rounding: the rounding direction of each weight is learned through a low-rank matrix (spec 2.3).

V = V0 + A1 @ A2 decides: the soft weight rounds up by rect(V), the hard one by [V >= 0]. One fused function
does forward and backward of a layer: it keeps V and the integers, and none of the steps between them.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from callbacks.quantization.grid import SMALLEST_STEP, Grid, fit_grid, grouped

ZETA, GAMMA = 1.1, -0.1
SATURATION = math.log((1 - GAMMA) / -GAMMA)
"""ln 11: beyond it `rect` is exactly 0 or 1."""
RoundingInit = Literal["fraction", "zero"]


def rect(v: Tensor) -> Tensor:
    """Rectified sigmoid: clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1); 0.5 at 0, saturated beyond ln 11."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def rect_inverse(fraction: Tensor) -> Tensor:
    """V with rect(v) = fraction, for fractions in [0, 1]: logit((f - gamma) / (zeta - gamma))."""
    return ((fraction - GAMMA) / (ZETA - GAMMA)).logit()


def rounding_penalty(delta: Tensor, beta: float) -> Tensor:
    """L_com of each entry: 1 - |2 delta - 1|^beta; 0 where decided, 1 at one half."""
    return 1 - (2 * delta - 1).abs().pow(beta)


def beta_at(step: int, total: int, start: float = 20.0, end: float = 2.0, warmup: float = 0.2) -> float:
    """AdaRound's schedule: `start` during the warm-up, then linear to `end`."""
    progress = max(0.0, (step - warmup * total) / ((1 - warmup) * total))
    return start + (end - start) * min(1.0, progress)


class _RoundedWeight(torch.autograd.Function):
    """(lower + D) s with D = [V >= 0] or rect(V), nothing added where the grid ends; the gradient is that of
    rect.

    No gradient passes through the floor that `lower` was made with: s is only the dequantization scale.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor, free: Tensor, v: Tensor, scale: Tensor, hard: bool) -> Tensor:
        centred = lower + ((v >= 0).logical_and_(free) if hard else rect(v).mul_(free))
        ctx.save_for_backward(free, v, scale, centred)
        return (grouped(centred, scale.shape[1]) * scale[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor | None, Tensor | None, None]:
        free, v, scale, centred = ctx.saved_tensors
        gradient = grouped(gradients[0], scale.shape[1])
        to_scale = None
        if ctx.needs_input_grad[3]:
            to_scale = torch.linalg.vecdot(gradient, grouped(centred, scale.shape[1]).to(gradient.dtype))
        if not ctx.needs_input_grad[2]:
            return None, None, None, to_scale, None
        # four passes over the matrix: through the step, the sigmoid, its clip, and the ends of the grid
        to_v = (gradient * ((ZETA - GAMMA) * scale)[..., None]).flatten(1)
        to_v = torch.ops.aten.sigmoid_backward(to_v, v.sigmoid())
        to_v = torch.ops.aten.hardtanh_backward(to_v, v, -SATURATION, SATURATION)
        return None, None, to_v.mul_(free), to_scale, None


def rounded_weight(lower: Tensor, free: Tensor, v: Tensor, scale: Tensor, hard: bool) -> Tensor:
    """The quantized weight (d_out, d_in), see the module's docstring.

    Args:
        lower: (d_out, d_in) integers, clamp(floor(W / s0) + z) - z.
        free: (d_out, d_in), whether the grid goes on above `lower`.
        v: (d_out, d_in), V.
        scale: (d_out, groups), the learned step s.
        hard: round (straight-through: the value is hard, the gradient soft) or stay soft.
    """
    return _RoundedWeight.apply(lower, free, v, scale, hard)


class LearnedRounding(nn.Module):
    """Everything that is learned about one weight matrix: rounding and steps.

    Untrained, the hard weight is round-to-nearest, and the soft one is the weight itself wherever the grid
    reaches it.

    Args:
        weight: (d_out, d_in), already truncated where that is wanted.
        bits: 2..8.
        group_size: columns that share a step; -1 is the row.
        symmetric: see `fit_grid`.
        rank: of A1 @ A2; 0 keeps round-to-nearest and learns steps only, "full" gives each weight a V of its
            own (AdaRound).
        init: `fraction` starts from the weight's own fraction; `zero` is the paper's literal text, where
            every weight starts half way between two grid points.
        generator: for A1, unit normal.
        learn_step: whether the steps are trained.
    """

    lower: Tensor
    free: Tensor
    nearest: Tensor
    offset: Tensor
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group_size: int = -1,
        symmetric: bool = False,
        rank: int | Literal["full"] = 5,
        init: RoundingInit = "fraction",
        generator: torch.Generator | None = None,
        learn_step: bool = True,
    ) -> None:
        super().__init__()
        weight = weight.detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        grid = fit_grid(weight, bits, group_size, symmetric)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.low, self.high = grid.low, grid.high
        self.hard = True
        scaled = (grouped(weight, grid.scale.shape[1]) / grid.scale[..., None]).flatten(1)
        floor = scaled.floor()
        nearest = scaled.round() > floor  # half to even, as everywhere
        base = grouped(floor, grid.scale.shape[1]) + grid.zero_point[..., None]
        lower = base.clamp(grid.low, grid.high)
        self.register_buffer("lower", (lower - grid.zero_point[..., None]).flatten(1).to(torch.int16))
        self.register_buffer("free", ((base >= grid.low) & (base < grid.high)).flatten(1))
        self.register_buffer("zero_point", grid.zero_point)
        self.register_buffer("nearest", nearest)
        if init == "fraction":
            offset = rect_inverse(scaled - floor)
            # a fraction next to one half must not change sides in the logarithm
            offset = torch.where(nearest, offset.clamp_min(0), offset.clamp_max(-1e-6))
        else:
            offset = torch.zeros_like(scaled)
        self.scale = nn.Parameter(grid.scale.clone(), requires_grad=learn_step)
        self.rank = rank
        self.left: nn.Parameter | None = None
        self.right: nn.Parameter | None = None
        self.full: nn.Parameter | None = None
        if rank == "full":
            self.full = nn.Parameter(offset)
        else:
            self.register_buffer("offset", offset)
            if rank > 0:
                left = torch.randn(len(weight), rank, generator=generator, dtype=weight.dtype)
                self.left = nn.Parameter(left.to(weight.device))
                self.right = nn.Parameter(weight.new_zeros(rank, weight.shape[1]))

    def logits(self) -> Tensor:
        """V, (d_out, d_in)."""
        if self.full is not None:
            return self.full
        if self.left is None or self.right is None:
            return self.offset
        return torch.addmm(self.offset, self.left, self.right)

    def forward(self) -> Tensor:
        """The quantized weight (d_out, d_in): soft, or hard with the soft gradient."""
        return rounded_weight(self.lower, self.free, self.logits(), self.scale, self.hard)

    def penalty(self, beta: float) -> Tensor:
        """Mean of L_com over the weights, scalar."""
        return rounding_penalty(rect(self.logits()), beta).mean()

    def rounding_parameters(self) -> list[nn.Parameter]:
        """A1 and A2, or the full matrix, or nothing."""
        return [p for p in (self.left, self.right, self.full) if p is not None]

    def step_parameters(self) -> list[nn.Parameter]:
        """The steps, where they are trained."""
        return [self.scale] if self.scale.requires_grad else []

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.lower.numel()

    @torch.no_grad()
    def clamp_steps(self) -> None:
        """Keep the steps positive after an optimiser step."""
        self.scale.clamp_(min=SMALLEST_STEP)

    @torch.no_grad()
    def integers(self) -> Tensor:
        """The hard integers (d_out, d_in), int16."""
        centred = self.lower + ((self.logits() >= 0) & self.free)
        return (grouped(centred, self.scale.shape[1]) + self.zero_point[..., None]).flatten(1).to(torch.int16)

    @torch.no_grad()
    def changed(self) -> float:
        """Share of the weights whose rounding differs from round-to-nearest."""
        moved = ((self.logits() >= 0) != self.nearest) & self.free
        return float(moved.double().mean())

    def grid(self) -> Grid:
        """The present grid."""
        return Grid(self.scale.detach(), self.zero_point, self.low, self.high)
