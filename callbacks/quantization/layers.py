"""Linear layers while they are quantized, and what is left of them afterwards."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from callbacks.quantization.activations import ActivationQuantizer
from callbacks.quantization.experts import Expert
from callbacks.quantization.grid import Grid, from_integers
from callbacks.quantization.offsets import LearnedOffset
from callbacks.quantization.rounding import LearnedRounding
from callbacks.quantization.scheme import Scheme


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight as (d_out, d_in), whatever way the layer keeps it."""
    weight = layer.get_parameter("weight").detach()
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def set_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Overwrite the weight with (d_out, d_in), cast to the layer's type."""
    layer.get_parameter("weight").copy_(matrix.T if isinstance(layer, Conv1D) else matrix)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name` of `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


@dataclass(frozen=True)
class QuantizedMatrix:
    """The final integers of a layer.

    Attributes:
        scheme: how it was quantized.
        integers: (d_out, d_in), int8 where symmetric, else uint8; None where the weight stays as it is.
        scale: (d_out, groups).
        zero_point: (d_out, groups), float with integer values.
        activation_step: the static step of the input; None where steps are taken from tokens.
        changed: share of the weights that are not rounded to nearest.
    """

    scheme: Scheme
    integers: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    activation_step: float | None = None
    changed: float = 0.0

    @classmethod
    def of(cls, scheme: Scheme, integers: Tensor, grid: Grid) -> "QuantizedMatrix":
        """From integers of any type."""
        kind = torch.int8 if scheme.symmetric else torch.uint8
        return cls(scheme, integers.to(kind), grid.scale.clone(), grid.zero_point.clone())

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(d_out, d_in), (q - z) s.

        Args:
            dtype: of the layer; s is taken as that type keeps it, which is what an exported folder has.
        """
        assert self.integers is not None
        assert self.scale is not None
        assert self.zero_point is not None
        scale = self.scale if dtype is None else self.scale.to(dtype).to(self.scale.dtype)
        return from_integers(self.integers.to(scale.dtype), Grid(scale, self.zero_point, 0, 0))

    def install(self, layer: nn.Module) -> RemovableHandle | None:
        """Give `layer` the quantized weight, and quantize its input from now on.

        Returns:
            The handle of the hook that does the latter, if there is one.
        """
        if self.integers is not None:
            weight = layer.get_parameter("weight")
            set_matrix(layer, self.weight(weight.dtype).to(weight.device))
            holder = layer.owner if isinstance(layer, Expert) else layer
            holder.weight_bits = float(self.scheme.bits)  # type: ignore[assignment]
        if self.scheme.activation_bits >= 16:
            return None
        quantizer = ActivationQuantizer(self.scheme.activation_bits, self.scheme.activation_mode)
        if self.activation_step is not None:
            quantizer.step = nn.Parameter(torch.tensor(self.activation_step), requires_grad=False)
        quantizer.to(layer.get_parameter("weight").device)
        return layer.register_forward_pre_hook(lambda _, arguments: (quantizer(arguments[0]), *arguments[1:]))


class LearnedLayer(nn.Module):
    """A linear layer whose rounding is being learned; with `active` off it is the layer that it was.

    Args:
        layer: the original; its weight stays what the full-precision targets are made with.
        scheme: of the layer.
        rounding: None where the weights stay as they are.
        activation: quantizer of the input.
    """

    def __init__(
        self,
        layer: nn.Module,
        scheme: Scheme,
        rounding: LearnedRounding | LearnedOffset | None,
        activation: ActivationQuantizer,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scheme = scheme
        self.rounding = rounding
        self.activation = activation
        self.active = False

    @property
    def weight(self) -> Tensor:
        """The original layer's: some blocks ask for its type."""
        return self.layer.get_parameter("weight")

    @property
    def bias(self) -> Any:
        """The original layer's."""
        return getattr(self.layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, with a quantized weight and input while `active`."""
        if not self.active:
            return self.layer(x)
        x = self.activation(x)
        if self.rounding is None:
            return self.layer(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.rounding()
        weight = weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)
        return F.linear(x, weight, self.bias)

    def harden(self) -> QuantizedMatrix:
        """The final integers; nothing of what learned them is kept."""
        step = self.activation.step
        activation_step = None if step is None else step.item()
        if self.rounding is None:
            return QuantizedMatrix(self.scheme, activation_step=activation_step)
        matrix = QuantizedMatrix.of(self.scheme, self.rounding.integers(), self.rounding.grid())
        return replace(matrix, activation_step=activation_step, changed=self.rounding.changed())
