"""Fake quantization of activations: per token on the fly, or one learnable step per tensor (S_X)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from callbacks.quantization.grid import SMALLEST_STEP, Grid, from_integers, to_integers

ActivationMode = Literal["dynamic_token", "dynamic_token_asymmetric", "static_tensor"]


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def token_steps(x: Tensor, bits: int) -> Tensor:
    """Symmetric step of each token, (..., 1): 2 max|x| / (2^b - 1), as the compressed-tensors runtime has it.

    In the type of `x`, as there. A token of zeros has a step too: half precision knows no 1e-8.
    """
    step = (x.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).clamp_min(SMALLEST_STEP)
    return torch.where(step > 0, step, torch.finfo(x.dtype).tiny)


def quantize_tokens(x: Tensor, bits: int, symmetric: bool = True) -> Tensor:
    """`x` (..., d) rounded to a grid of its own for each token; straight-through gradient (spec 2.2).

    Args:
        x: activations.
        bits: 2..8.
        symmetric: False takes the asymmetric formula of the weights, which no int8 runtime has.
    """
    if symmetric:
        half = 2 ** (bits - 1)
        step = token_steps(x.detach(), bits)
        rounded = (x.detach() / step).round().clamp(-half, half - 1) * step
        return x + (rounded.to(x.dtype) - x).detach()
    flat = _wide(x.detach().reshape(-1, x.shape[-1]))
    high = 2**bits - 1
    bottom, top = flat.amin(1, keepdim=True).clamp_max(0), flat.amax(1, keepdim=True).clamp_min(0)
    step = ((top - bottom) / high).clamp_min(SMALLEST_STEP)
    grid = Grid(step, (-bottom / step).round(), 0, high)
    return x + (from_integers(to_integers(flat, grid), grid).view_as(x).to(x.dtype) - x).detach()


class _LearnedStep(torch.autograd.Function):
    """round(x / s) s with LSQ's gradient: round(x/s) - x/s inside the range, the bound outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, half: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.half = half
        return (x / step).round().clamp(-half, half - 1) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, step = ctx.saved_tensors
        scaled = x / step
        inside = (scaled >= -ctx.half) & (scaled <= ctx.half - 1)
        bounded = scaled.clamp(-ctx.half, ctx.half - 1)
        slope = torch.where(inside, scaled.round() - scaled, bounded)
        return gradient * inside, (gradient * slope).sum().view_as(step), None


def quantize_tensor(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """`x` rounded to a symmetric grid of one learnable step (scalar tensor)."""
    return _LearnedStep.apply(x, step, 2 ** (bits - 1))


class ActivationQuantizer(nn.Module):
    """Rounds what goes into a layer.

    Args:
        bits: 2..8; 16 and more change nothing.
        mode: `dynamic_token` and `dynamic_token_asymmetric` have no state; `static_tensor` has one positive
            step.
        largest: max|x| over the calibration set, for the first value of a static step.
    """

    def __init__(self, bits: int, mode: ActivationMode, largest: float = 0.0) -> None:
        super().__init__()
        self.bits = bits
        self.mode = mode
        self.step: nn.Parameter | None = None
        if mode == "static_tensor" and bits < 16:
            first = max(largest / ((2**bits - 1) / 2), SMALLEST_STEP)
            self.step = nn.Parameter(torch.tensor(first))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized `x`, same shape and type."""
        if self.bits >= 16:
            return x
        if self.step is None:
            return quantize_tokens(x, self.bits, self.mode == "dynamic_token")
        return quantize_tensor(_wide(x), self.step, self.bits).to(x.dtype)
