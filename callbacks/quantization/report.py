"""What a quantized model is, in numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from callbacks.quantization.experts import stored_parameter
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.scheme import Scheme


def describe(
    network: nn.Module, matrices: Mapping[str, QuantizedMatrix], scheme: Scheme, blocks: str = ""
) -> dict[str, Any]:
    """Scheme, size and rounding of a quantized network.

    Args:
        network: with hard weights.
        matrices: the integers of each quantized layer.
        scheme: what holds for most layers.
        blocks: path of the blocks.

    Returns:
        `bits`, `group_size`, `symmetric`, `activation_bits`; `quantized_weights` of `weights` in the whole
        network, and `block_weights`, the matrices in its blocks, of which `quantized_block_share` is
        quantized;
        `bits_per_quantized_weight` with scales (and zero points) of 16 (and the weights' own) bits;
        `rounding_changed`, the share of weights not rounded to nearest; `layers` with scheme and share of
        each.
    """
    integers = [matrix for matrix in matrices.values() if matrix.integers is not None]
    count = sum(matrix.integers.numel() for matrix in integers if matrix.integers is not None)
    bits = sum(_bits(matrix) for matrix in integers)
    total = sum(block_weights(network, blocks).values())
    changed = sum(m.changed * m.integers.numel() for m in integers if m.integers is not None)
    return {
        "scheme": str(scheme),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activation_bits": scheme.activation_bits,
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "quantized_weights": count,
        "block_weights": total,
        "quantized_block_share": count / total if total else 0.0,
        "bits_per_quantized_weight": bits / count if count else 16.0,
        "rounding_changed": changed / count if count else 0.0,
        "layers": {
            name: {"scheme": str(matrix.scheme), "rounding_changed": matrix.changed}
            for name, matrix in matrices.items()
        },
    }


def block_weights(network: nn.Module, blocks: str) -> dict[str, int]:
    """How many weights each matrix inside the blocks has; vectors (norms, biases) are none."""
    prefix = f"{blocks}." if blocks else ""
    return {
        name: parameter.numel()
        for name, parameter in network.named_parameters()
        if name.startswith(prefix) and parameter.ndim >= 2
    }


def left_out(network: nn.Module, blocks: str, layers: Iterable[str]) -> dict[str, int]:
    """The matrices inside the blocks that are none of `layers`, with their sizes, the largest first.

    Args:
        network: of the blocks.
        blocks: their path.
        layers: names of layers; those of experts are parts of a parameter.
    """
    covered = {stored_parameter(network.get_submodule(name)) for name in layers}
    sizes = block_weights(network, blocks)
    rest = {name: size for name, size in sizes.items() if network.get_parameter(name) not in covered}
    return dict(sorted(rest.items(), key=lambda item: -item[1]))


def _bits(matrix: QuantizedMatrix) -> float:
    """Bits of a layer's integers, its steps in half precision, and its zero points."""
    assert matrix.integers is not None
    assert matrix.scale is not None
    of_group = 16 + (0 if matrix.scheme.symmetric else matrix.scheme.bits)
    return matrix.scheme.bits * matrix.integers.numel() + of_group * matrix.scale.numel()
