"""The quantized network with the integers of a runtime: int8 weights and QDQ nodes in ONNX.

Two ranges of an operand are two products, whose sum is exact; steps of heads are taken out of the product.
Nothing of what was measured in torch changes but the order of float additions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.deploy.onnx import export_onnx
from callbacks.quantization.vision.layers import QuantizedLayer, QuantizedProduct, QuantizedUnit
from callbacks.quantization.vision.operands import (
    LOWEST_GELU,
    AffineOperand,
    GELUOperand,
    Operand,
    SoftmaxOperand,
)
from callbacks.quantization.vision.products import no_products
from lightning_modules.parts.inference import InferencePath, spec_of


@torch.library.custom_op("featherlight::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`x` by way of int8, one scale."""
    codes = ((x / scale).round() + zero_point).clamp(-128, 127)
    return (codes - zero_point) * scale


@torch.library.custom_op("featherlight::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """int8 codes with a scale for each entry along `axis`."""
    shape = [-1 if dim == axis else 1 for dim in range(codes.ndim)]
    return codes.to(scale.dtype) * scale.view(shape)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def translations() -> dict[Any, Any]:
    """What the two operators are in ONNX."""
    from onnxscript import opset18 as op

    def both(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def only(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    return {
        torch.ops.featherlight.quantize_dequantize.default: both,
        torch.ops.featherlight.dequantize.default: only,
    }


class IntegerOperand(nn.Module):
    """An operand as one or two int8 tensors.

    Args:
        operand: calibrated, of 8 bits.
    """

    factor: Tensor | None
    split: Tensor

    def __init__(self, operand: Operand) -> None:
        super().__init__()
        step = operand.step.detach()
        self._kind = operand
        zero = torch.zeros((), dtype=torch.int8)
        scales = [step.flatten()[:1]]
        factor: Tensor | None = None
        if isinstance(operand, AffineOperand):
            zero = (-operand.offset_of(step) / step).round().to(torch.int8).view(())
        elif isinstance(operand, GELUOperand):
            scales.append(torch.full_like(scales[0], LOWEST_GELU / 128))
        elif isinstance(operand, SoftmaxOperand):
            scales = [torch.full_like(step, 1 / 127), step / 127]
        elif step.numel() > 1:
            scales, factor = [torch.ones(1)], step.clone()
        self.register_buffer("factor", factor)
        for number, scale in enumerate(scales):
            self.register_buffer(f"scale_{number}", scale.clone().view(()))
        self.register_buffer("zero", zero)
        self.register_buffer("split", step.clone())

    def forward(self, x: Tensor) -> list[Tensor]:
        """What adds up to the operand, without `factor`."""
        if isinstance(self._kind, GELUOperand):
            return [self._rounded(x.clamp_min(0), 0), self._rounded(x.clamp_max(0), 1)]
        if isinstance(self._kind, SoftmaxOperand) and self._kind.form != "uniform":
            if self._kind.form == "released_sum":
                above, below = torch.maximum(x, self.split), torch.minimum(x, self.split)
            else:
                upper, zero = x >= self.split, torch.zeros_like(x)
                above, below = torch.where(upper, x, zero), torch.where(upper, zero, x)
            return [self._rounded(above, 0), self._rounded(below, 1)]
        return [self._rounded(x if self.factor is None else x / self.factor, 0)]

    def _rounded(self, x: Tensor, number: int) -> Tensor:
        scale = self.get_buffer(f"scale_{number}")
        return torch.ops.featherlight.quantize_dequantize(x, scale, self.zero)


class IntegerLayer(nn.Module):
    """A linear layer or convolution with int8 weights.

    Args:
        unit: calibrated.
    """

    def __init__(self, unit: QuantizedLayer) -> None:
        super().__init__()
        layer: Any = unit.layer
        self._layer = (layer,)  # a tuple: not a part of this one
        self.linear = unit.linear
        self.input = None if unit.input is None else IntegerOperand(unit.input)
        weight = layer.get_parameter("weight").detach()
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.axis = 1 if self.linear or isinstance(layer, nn.ConvTranspose2d) else 0
        if unit.weight is None:
            self.register_buffer("weight", weight.T.contiguous() if self.linear else weight)
            return
        codes = (weight / unit.weight.step).round().to(torch.int8)
        steps = unit.weight.step.flatten().expand(len(codes)) if self.linear else unit.weight.step.flatten()
        self.register_buffer("codes", codes.T.contiguous() if self.linear else codes)
        self.register_buffer("scale", steps.clone())
        self.register_buffer("zero", torch.zeros(len(steps), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        weight = getattr(self, "weight", None)
        if weight is None:
            weight = torch.ops.featherlight.dequantize(self.codes, self.scale, self.zero, self.axis)
        parts = [x] if self.input is None else self.input(x)
        if self.linear:
            with no_products():
                output = parts[0] @ weight
                for part in parts[1:]:
                    output = output + part @ weight
            return output if self.bias is None else output + self.bias
        (layer,) = self._layer
        return torch.func.functional_call(_bare(layer), {"weight": weight}, (parts[0],))


class IntegerProduct(nn.Module):
    """A product of int8 operands."""

    def __init__(self, unit: QuantizedProduct) -> None:
        super().__init__()
        self.left, self.right = IntegerOperand(unit.left), IntegerOperand(unit.right)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """A @ B."""
        (right,) = self.right(b)
        first, *others = [left @ right for left in self.left(a)]
        for other in others:
            first = first + other
        for operand in (self.left, self.right):
            if operand.factor is not None:
                first = first * operand.factor
        return first


def _bare(layer: nn.Module) -> nn.Module:
    """A layer of the same settings without hooks and operands."""
    bare = layer.__class__.__new__(layer.__class__)
    nn.Module.__init__(bare)
    for key, value in vars(layer).items():
        if key not in ("_forward_pre_hooks", "_forward_hooks", "_modules", "_buffers"):
            bare.__dict__[key] = value
    return bare


@contextmanager
def integer_form(network: nn.Module, units: Mapping[str, QuantizedUnit]) -> Iterator[None]:
    """Layers and products of integers in the places of the quantized ones, while the context is open."""
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for name, unit in units.items():
        parent, _, child = name.rpartition(".")
        integer = IntegerLayer(unit) if isinstance(unit, QuantizedLayer) else None
        if isinstance(unit, QuantizedProduct):
            integer = IntegerProduct(unit)  # type: ignore[assignment]
        owner = network.get_submodule(parent)
        places.append((owner, child, network.get_submodule(name)))
        assert integer is not None
        owner.add_module(child, integer.eval())
    for owner in list(network.modules()):
        for child, module in list(owner.named_children()):
            if type(module) is nn.BatchNorm2d and _neutral(module):
                places.append((owner, child, module))
                owner.add_module(child, nn.Identity())
    try:
        yield
    finally:
        for owner, child, module in places:
            owner.add_module(child, module)


def _neutral(norm: nn.BatchNorm2d) -> bool:
    """Whether a batch norm was folded into the convolution before it."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or norm.weight is None:
        return False
    same = torch.equal(variance, torch.full_like(variance, 1 - norm.eps))
    return same and not mean.any() and not norm.bias.any() and bool((norm.weight == 1).all())


def export_float(module: LightningModule, inputs: Mapping[str, Tensor], folder: Path) -> Path:
    """The network in full precision, to compare with; returns the file."""
    path = folder / ".ptq_float.onnx"
    with on_cpu(module), torch.no_grad():
        export_onnx(InferencePath(module), _example(inputs), path, 1e-3, spec=spec_of(module))
    return path


def export_integers(
    module: LightningModule,
    units: Mapping[str, QuantizedUnit],
    inputs: Mapping[str, Tensor],
    path: Path,
    tolerance: float,
) -> dict[str, Any]:
    """Export the quantized network with QDQ nodes, if onnxruntime gives what torch gives.

    Args:
        module: quantized, in eval mode.
        units: of its network.
        inputs: of a batch.
        path: the file.
        tolerance: largest absolute difference of an output from torch's integer form; a code may round to
            the other side where sums are in another order.

    Returns:
        As `export_onnx`.
    """
    path_through = InferencePath(module)
    with on_cpu(module), torch.no_grad(), integer_form(path_through.network, units):
        return export_onnx(
            path_through, _example(inputs), path, tolerance, spec=spec_of(module), translations=translations()
        )


def _example(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:3].detach().cpu() for name, tensor in inputs.items()}


@contextmanager
def on_cpu(module: LightningModule) -> Iterator[None]:
    """The module on the CPU while the context is open."""
    device = module.device
    module.cpu()
    try:
        yield
    finally:
        module.to(device)
