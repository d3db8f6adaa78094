"""Quantizers of what goes into a layer or a product (TinySAM, spec 2.5), as functions and as modules.

All round half to even to codes of `bits` bits: qmax = 2^(bits - 1), signed codes are -qmax..qmax - 1. Steps
broadcast against what they quantize: (1,) for a whole tensor, (1, heads, 1, 1), (rows, 1),
(channels, 1, 1, 1).
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from callbacks.quantization.grid import SMALLEST_STEP, integer_range

LOWEST_GELU = 0.16997124254703522
"""-min GELU(x): below it a GELU's output never comes, so that its negative step is known."""

SPLITS = tuple(2.0**-exponent for exponent in range(20))
"""Where the two ranges of a softmax may meet."""

SoftmaxQuant = Literal["disjoint", "released_sum", "uniform"]


def rounded(x: Tensor, step: Tensor, low: int, high: int, offset: Tensor | None = None) -> Tensor:
    """`offset` + s clamp(round((x - offset) / s), low, high), in the type of `x`."""
    codes = x if offset is None else x - offset
    values = (codes / step).round().clamp(low, high) * step
    return (values if offset is None else values + offset).to(x.dtype)


def quantize_uniform(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Symmetric: codes -qmax..qmax - 1."""
    return rounded(x, step, *integer_range(bits, True))


def gelu_parts(x: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The positive and the negative part of a GELU's output, with a step each; their sum is the quantized
    `x`.
    """
    low, high = integer_range(bits, True)
    negative = torch.full_like(step, LOWEST_GELU / -low)
    return rounded(x.clamp_min(0), step, 0, high), rounded(x.clamp_max(0), negative, low, 0)


def softmax_parts(x: Tensor, split: Tensor, bits: int, form: SoftmaxQuant) -> tuple[Tensor, Tensor]:
    """Probabilities from `split` upwards and those below it, with a step each; their sum is the quantized
    `x`.

    Args:
        x: probabilities.
        split: p, (1,).
        bits: codes are 0..qmax - 1 in both ranges.
        form: `disjoint` puts every probability into its own range; `released_sum` is the literal
            Q(max(x, p)) + Q(min(x, p)) of the released code, about x + p.
    """
    high = integer_range(bits, True)[1]
    if form == "released_sum":
        above, below = torch.maximum(x, split), torch.minimum(x, split)
    else:
        upper, zero = x >= split, torch.zeros_like(x)
        above, below = torch.where(upper, x, zero), torch.where(upper, zero, x)
    return probability_codes(above, high), rounded(below, split / high, 0, high)


def probability_codes(x: Tensor, high: int) -> Tensor:
    """Probabilities in steps of 1 / high; multiplied, so that one half is a tie as it is written."""
    return (x * high).round().clamp(0, high) / high


def minmax_step(largest: Tensor, bits: int) -> Tensor:
    """The step that covers values up to `largest`: largest / (qmax - 1/2)."""
    return (largest / (2 ** (bits - 1) - 0.5)).clamp_min(SMALLEST_STEP)


class Operand(nn.Module, ABC):
    """Quantizes one operand: an input, a weight, or a factor of a product.

    What it has found lies in buffers, so that a state dict brings it back; until then they are empty, and
    quantizing is refused.

    Args:
        bits: 2..8.
    """

    step: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("step", torch.zeros(0))

    @property
    def calibrated(self) -> bool:
        """Whether a step was found or loaded."""
        return self.step.numel() > 0

    @abstractmethod
    def base(self, x: Tensor) -> Tensor:
        """The min-max step of observed values."""

    @abstractmethod
    def parts(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """What adds up to the quantized `x`: a tensor for each range, each with one step."""

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        """`x` with another step than the found one."""
        first, *others = self.parts(x, step)
        for other in others:
            first = first + other
        return first

    def candidates(self, x: Tensor, steps: Tensor) -> Tensor:
        """`x` with each of several steps, (candidates, *x.shape)."""
        if steps.ndim == 2:
            steps = steps.view(-1, *(1,) * x.ndim)
        return self.quantize(x.expand(len(steps), *x.shape), steps)

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the found step, same shape and type.

        Raises:
            RuntimeError: nothing was found yet.
        """
        if not self.calibrated:
            raise RuntimeError(
                f"{type(self).__name__} of {self.bits} bits is not calibrated: run `test` or `validate` with "
                "HessianPTQ, or load the steps that a calibration has written."
            )
        return self.quantize(x, self.step)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, own in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(f"{prefix}{name}")
            if isinstance(saved, Tensor):
                setattr(self, name, own.new_zeros(saved.shape))  # empty until now
        super()._load_from_state_dict(state_dict, prefix, *rest)


class UniformOperand(Operand):
    """Symmetric, one step for what `dims` leave over.

    Args:
        bits: 2..8.
        dims: axes whose entries share a step; None shares it among all.
        groups: row groups of a matrix, each with a step.
    """

    def __init__(self, bits: int, dims: tuple[int, ...] | None = None, groups: int = 1) -> None:
        super().__init__(bits)
        self.dims = dims
        self.groups = groups

    def base(self, x: Tensor) -> Tensor:
        """max|x| / (qmax - 1/2)."""
        if self.groups > 1:
            largest = x.abs().unflatten(0, (self.groups, -1)).flatten(1).amax(1)
            return minmax_step(largest.repeat_interleave(len(x) // self.groups), self.bits)[:, None]
        if self.dims is None:
            return minmax_step(x.abs().amax().view(1), self.bits)
        return minmax_step(x.abs().amax(self.dims, keepdim=True), self.bits)

    def parts(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """One range."""
        return (rounded(x, step, *integer_range(self.bits, True)),)


class GELUOperand(Operand):
    """The output of a GELU: a step for positive values, a known one for negative values."""

    def base(self, x: Tensor) -> Tensor:
        """max(x) / (qmax - 1/2)."""
        return minmax_step(x.amax().view(1), self.bits)

    def parts(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Positive and negative."""
        return gelu_parts(x, step, self.bits)


class SoftmaxOperand(Operand):
    """Probabilities in two ranges that meet at `step`, the split.

    Args:
        bits: 2..8.
        form: see `softmax_parts`.
    """

    def __init__(self, bits: int, form: SoftmaxQuant = "disjoint") -> None:
        super().__init__(bits)
        self.form = form

    def base(self, x: Tensor) -> Tensor:
        """A split at 1: one range."""
        return x.new_ones(1)

    def parts(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """From the split upwards, and below."""
        if self.form == "uniform":
            high = integer_range(self.bits, True)[1]
            return (probability_codes(x, high),)
        return softmax_parts(x, step, self.bits, self.form)


class AffineOperand(Operand):
    """A convolution's input: symmetric around (min + max) / 2.

    Args:
        bits: 2..8.
        aligned: 0 is on the grid, as the integers of a runtime need it.
    """

    offset: Tensor

    def __init__(self, bits: int, aligned: bool = False) -> None:
        super().__init__(bits)
        self.aligned = aligned
        self.register_buffer("offset", torch.zeros(0))

    def base(self, x: Tensor) -> Tensor:
        """(max - min) / 2 / (qmax - 1/2); keeps the offset."""
        bottom, top = x.amin().view(1), x.amax().view(1)
        if self.aligned:
            bottom, top = bottom.clamp_max(0), top.clamp_min(0)
        self.offset = (bottom + top) / 2
        return minmax_step((top - bottom) / 2, self.bits)

    def offset_of(self, step: Tensor) -> Tensor:
        """The offset, on the grid where that is wanted."""
        if not self.aligned:
            return self.offset
        low, high = integer_range(self.bits, True)
        return -(-self.offset / step).round().clamp(low, high) * step

    def parts(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """One range."""
        return (rounded(x, step, *integer_range(self.bits, True), self.offset_of(step)),)
