"""What a quantized vision network is, in numbers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from callbacks.quantization.vision.layers import QuantizedLayer, QuantizedUnit
from callbacks.quantization.vision.settings import PTQSettings


def describe_units(
    network: nn.Module, units: Mapping[str, QuantizedUnit], settings: PTQSettings
) -> dict[str, Any]:
    """Scheme and size of a quantized network.

    Returns:
        `bits`, `activation_bits`, `search`; `quantized_weights` of `weights` in the whole network, and
        `bits_per_quantized_weight` with steps of 32 bits; `layers` with the bits of each.
    """
    layers = [u for u in units.values() if isinstance(u, QuantizedLayer) and u.weight is not None]
    count = sum(unit.layer.get_parameter("weight").numel() for unit in layers)
    bits = sum(
        unit.weight.bits * unit.layer.get_parameter("weight").numel() + 32 * unit.weight.step.unique().numel()
        for unit in layers
        if unit.weight is not None
    )
    return {
        "scheme": str(settings.scheme),
        "bits": settings.bits,
        "activation_bits": settings.activation_bits,
        "search": settings.search if settings.search == "minmax" else f"grid, {settings.grad_source}",
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "quantized_weights": count,
        "bits_per_quantized_weight": bits / count if count else 32.0,
        "quantized_units": len(units),
        "layers": {
            name: {key: operand.bits for key, operand in unit.operands().items()}
            for name, unit in units.items()
        },
    }


def effective_macs(macs: float, quantized: float, bits: int) -> float:
    """Multiply-accumulates in units of 32 bits, as TinySAM counts them: F + Q bits / 32 (spec 2.5).

    Args:
        macs: F + Q, of the whole network.
        quantized: Q, those of the quantized layers and products.
        bits: of the quantized ones.
    """
    return macs - quantized + quantized * bits / 32
