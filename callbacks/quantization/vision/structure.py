"""A network made ready to be quantized, and its quantized form as plain tensors and numbers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from callbacks.quantization.scheme import VisionScheme
from callbacks.quantization.vision.layers import QuantizedLayer, QuantizedProduct, QuantizedUnit
from callbacks.quantization.vision.observe import Observation
from callbacks.quantization.vision.operands import SoftmaxQuant
from callbacks.quantization.vision.products import Product, install_products


@dataclass(frozen=True)
class Form:
    """How the units of a network are quantized, besides their schemes.

    Attributes:
        softmax: of probabilities.
        gelu: whether the input behind a GELU has two ranges.
        aligned: whether 0 is on the grid of a convolution's input.
    """

    softmax: SoftmaxQuant = "disjoint"
    gelu: bool = True
    aligned: bool = False


@dataclass
class Structure:
    """What was changed in a network before anything is quantized.

    Attributes:
        folds: `{convolution: batch norm that was folded into it}`.
        products: `{module: its matrix products, see install_products}`.
        after_gelu: linear layers behind a GELU.
        order: names of layers and products, as they are computed.
        bytes: of what is kept of each while calibrating.
    """

    folds: dict[str, str] = field(default_factory=dict)
    products: dict[str, list[str | None]] = field(default_factory=dict)
    after_gelu: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, seen: Observation) -> "Structure":
        """From what was seen; products come behind the layers, until `sort` knows better."""
        products = {name: calls for name, calls in seen.products.items() if any(calls)}
        names = [
            f"{name}.products.{number}".removeprefix(".")
            for name, calls in products.items()
            for number in range(sum(call is not None for call in calls))
        ]
        return cls(dict(seen.folds), products, sorted(seen.after_gelu), [*seen.order, *names])

    def sort(self, network: nn.Module, run: Callable[[], Any]) -> None:
        """Put layers and products in the order in which `run()` calls them first."""
        called: dict[str, None] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda *_: called.setdefault(name)

        handles = [network.get_submodule(name).register_forward_pre_hook(note(name)) for name in self.order]
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        self.order = [*called, *(name for name in self.order if name not in called)]

    def apply(self, network: nn.Module) -> None:
        """Fold and install; the outputs stay what they are up to rounding."""
        for convolution, norm in self.folds.items():
            fold(network.get_submodule(convolution), network.get_submodule(norm))
        for name, calls in self.products.items():
            install_products(network.get_submodule(name), calls)


@torch.no_grad()
def fold(convolution: Any, norm: Any) -> None:
    """Move a batch norm into the convolution before it; it stays in its place and changes nothing more."""
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.weight.copy_(weight)
    convolution.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        if isinstance(tensor := getattr(norm, name), Tensor):
            tensor.fill_(value)


def unit_of(
    network: nn.Module, name: str, scheme: VisionScheme, structure: Structure, form: Form
) -> QuantizedUnit:
    """The layer or product `name`, with operands that are not calibrated."""
    module = network.get_submodule(name)
    if isinstance(module, Product):
        device = next(network.parameters()).device
        return QuantizedProduct(module, scheme.activation_bits, form.softmax, device)
    fused = name.rpartition(".")[2] == "qkv" and isinstance(module, nn.Linear) and len(module.weight) % 3 == 0
    after_gelu = form.gelu and name in structure.after_gelu
    return QuantizedLayer(module, scheme, after_gelu, form.aligned, 3 if fused else 1)


def as_plain(
    structure: Structure, form: Form, schemes: Mapping[str, VisionScheme], units: Mapping[str, QuantizedUnit]
) -> dict[str, Any]:
    """Structure and steps as tensors, numbers and strings: loads with `weights_only=True`."""
    return {
        "structure": asdict(structure),
        "form": asdict(form),
        "units": {
            name: {
                "scheme": asdict(schemes[name]),
                "operands": {key: _buffers(operand) for key, operand in unit.operands().items()},
            }
            for name, unit in units.items()
        },
    }


def _buffers(operand: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in operand.named_buffers()}


def install_plain(network: nn.Module, content: Mapping[str, Any]) -> dict[str, QuantizedUnit]:
    """Quantize a float network as `as_plain` says, without calibrating."""
    structure, form = Structure(**content["structure"]), Form(**content["form"])
    structure.apply(network)
    units = {}
    for name, saved in content["units"].items():
        unit = unit_of(network, name, VisionScheme(**saved["scheme"]), structure, form)
        for key, operand in unit.operands().items():
            operand.load_state_dict(saved["operands"][key])
        units[name] = unit
    for unit in units.values():
        unit.install()
    return units
