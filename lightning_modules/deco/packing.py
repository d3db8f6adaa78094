"""Convolutions and linear layers with weights packed once for oneDNN, for inference on a CPU.

In eager mode PyTorch brings the weights of every layer into oneDNN's own layout in every call, which at
batch 1 costs about as much as a tenth of the arithmetic. These layers keep the packed copy, and let oneDNN
apply the activation while it writes the output. They use the operators that PyTorch's own compiler emits
for a CPU; where those are missing, or on another device or type, or while exporting, they are the ordinary
layers.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.deco.layers import ConvNorm

Activation = Literal["none", "relu", "swish"]

_FUNCTIONS = {"none": lambda values: values, "relu": F.relu, "swish": F.silu}


class _Packed(nn.Module):
    """A layer that keeps its plain weight for everything but its own forward pass."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, activation: Activation = "none") -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), False)
        self.activation = activation
        self._packed: Tensor | None = None
        self._packed_for: Any = None

    def _packs(self, inputs: Tensor) -> bool:
        plain = inputs.device.type == "cpu" and inputs.dtype == self.weight.dtype == torch.float32
        watched = (
            torch._C._len_torch_dispatch_stack() > 0
        )  # a FLOP counter has no formula for oneDNN's operators
        return (
            plain
            and not watched
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed copy, which only this process can read."""
        return {**self.__dict__, "_packed": None, "_packed_for": None}


class PackedConv2d(_Packed):
    """`activation(conv(x))`.

    Args:
        conv: the layer that it replaces, zero-padded.
        activation: applied to the output.
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation = "none") -> None:
        super().__init__(conv, activation)
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels_in, h, w) to (batch, channels_out, h', w')."""
        padding, stride, dilation, groups = self.geometry
        if not self._packs(features):
            hidden = F.conv2d(features, self.weight, self.bias, stride, padding, dilation, groups)
            return _FUNCTIONS[self.activation](hidden)
        shape = list(features.shape)
        if self._packed_for != shape:  # oneDNN chooses the layout for a size
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the shape
            self._packed = reorder(self.weight.to_mkldnn(), *self.geometry, shape)
            self._packed_for = shape
        return torch.ops.mkldnn._convolution_pointwise(
            features, self._packed, self.bias, *self.geometry, self.activation, [], ""
        )


class PackedLinear(_Packed):
    """A linear layer.

    Args:
        linear: the layer that it replaces.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., features_in) to (..., features_out)."""
        if not self._packs(hidden):
            return F.linear(hidden, self.weight, self.bias)
        count = hidden.numel() // hidden.shape[-1]
        if self._packed_for != count:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, count)
            self._packed_for = count
        return torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self.bias, "none", [], "")


def can_pack() -> bool:
    """Whether this PyTorch has oneDNN and the operators that are needed."""
    if not torch.backends.mkldnn.is_available():
        return False
    names = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
    return hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def pack(network: nn.Module) -> None:
    """Replace every convolution and linear layer of a folded network in place; names of weights stay."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, PackedConv2d(child, _taken_activation(parent)))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child))


def _taken_activation(parent: nn.Module) -> Activation:
    """The activation behind the convolution of `parent`, which is removed there."""
    if not isinstance(parent, ConvNorm) or not isinstance(parent.norm, nn.Identity):
        return "none"
    activation, parent.act = parent.act, nn.Identity()
    return (
        "relu" if isinstance(activation, nn.ReLU) else "swish" if isinstance(activation, nn.SiLU) else "none"
    )
