"""What a quantized model is, in numbers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.scheme import Scheme


def describe(network: nn.Module, matrices: Mapping[str, QuantizedMatrix], scheme: Scheme) -> dict[str, Any]:
    """Scheme, size and rounding of a quantized network.

    Args:
        network: with hard weights.
        matrices: the integers of each quantized layer.
        scheme: what holds for most layers.

    Returns:
        `bits`, `group_size`, `symmetric`, `activation_bits`; `quantized_weights` of `weights` in the whole
        network; `bits_per_quantized_weight` with scales (and zero points) of 16 (and the weights' own) bits;
        `rounding_changed`, the share of weights not rounded to nearest; `layers` with scheme and share of
        each.
    """
    integers = [matrix for matrix in matrices.values() if matrix.integers is not None]
    count = sum(matrix.integers.numel() for matrix in integers if matrix.integers is not None)
    bits = sum(_bits(matrix) for matrix in integers)
    changed = sum(m.changed * m.integers.numel() for m in integers if m.integers is not None)
    return {
        "scheme": str(scheme),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activation_bits": scheme.activation_bits,
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "quantized_weights": count,
        "bits_per_quantized_weight": bits / count if count else 16.0,
        "rounding_changed": changed / count if count else 0.0,
        "layers": {
            name: {"scheme": str(matrix.scheme), "rounding_changed": matrix.changed}
            for name, matrix in matrices.items()
        },
    }


def _bits(matrix: QuantizedMatrix) -> float:
    """Bits of a layer's integers, its steps in half precision, and its zero points."""
    assert matrix.integers is not None
    assert matrix.scale is not None
    of_group = 16 + (0 if matrix.scheme.symmetric else matrix.scheme.bits)
    return matrix.scheme.bits * matrix.integers.numel() + of_group * matrix.scale.numel()
