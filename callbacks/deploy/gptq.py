"""GPTQ's checkpoint layout (`gptq_v2`), which vLLM and transformers with gptqmodel load.

A layer of (d_out, d_in) is kept transposed: `qweight` int32 (d_in bits / 32, d_out) has the integers of a
column one after another from the lowest bit on, `qzeros` int32 (groups, d_out bits / 32) the zero points of a
group in the same way along the outputs, `scales` float16 (groups, d_out), `g_idx` int32 (d_in,) each input's
group. The older layout keeps zero points less one; `checkpoint_format` tells them apart.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.deploy.saved_names import saved_names
from callbacks.quantization.experts import Expert
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.scheme import Scheme

_WIDTHS = (2, 3, 4, 8)


def gptq_config(network: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> dict[str, Any]:
    """`quantization_config` of the exported folder.

    Raises:
        MisconfigurationException: the layout cannot express a layer, or not one scheme for all.
    """
    for name, matrix in matrices.items():
        reason = _reason(matrix.scheme, network.get_submodule(name))
        if reason is not None:
            raise MisconfigurationException(
                f"The GPTQ layout cannot express layer '{name}' ({matrix.scheme}): {reason}. Export it as "
                "dense."
            )
    saved_names(network, matrices)
    schemes = {matrix.scheme for matrix in matrices.values()}
    common = max(schemes, key=lambda scheme: sum(m.scheme == scheme for m in matrices.values()))
    left_out = [
        name
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear) and name not in matrices and part is not _head(network)
    ]
    dynamic: dict[str, dict[str, Any]] = {f"-:{_pattern(name)}": {} for name in left_out} | {
        f"+:{_pattern(name)}": {
            "bits": matrix.scheme.bits,
            "group_size": matrix.scheme.group_size,
            "sym": matrix.scheme.symmetric,
        }
        for name, matrix in matrices.items()
        if matrix.scheme != common
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": common.bits,
        "group_size": common.group_size,
        "sym": common.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _pattern(name: str) -> str:
    return f"^{name.replace('.', '[.]')}$"


def _head(network: Any) -> nn.Module | None:
    return network.get_output_embeddings()


def _reason(scheme: Scheme, layer: nn.Module) -> str | None:
    """Why a layer cannot be expressed; None where it can."""
    if scheme.bits not in _WIDTHS:
        return f"its weights have {', '.join(map(str, _WIDTHS[:-1]))} or {_WIDTHS[-1]} bits"
    if scheme.activation_bits < 16:
        return "it has no quantized activations"
    if type(layer) is not nn.Linear:
        kind = "an expert in a 3-D parameter" if isinstance(layer, Expert) else f"a {type(layer).__name__}"
        return f"it is {kind}, not a Linear"
    if layer.in_features % 32 or layer.out_features % 32:
        return f"its sizes {layer.in_features} and {layer.out_features} are no multiples of 32"
    return None


def packed_bits(integers: Tensor, bits: int) -> Tensor:
    """Integers 0 .. 2^bits - 1 (count, n) as int32 words (count bits / 32, n), the lowest bits first.

    Args:
        integers: `count` bits must be a multiple of 32.
        bits: of each.
    """
    shifts = torch.arange(bits, dtype=torch.int64, device=integers.device)[None, :, None]
    stream = (integers.long()[:, None] >> shifts & 1).flatten(0, 1)  # (count bits, n)
    words = stream.unflatten(0, (-1, 32))
    places = torch.arange(32, dtype=torch.int64, device=integers.device)[None, :, None]
    values = (words << places).sum(1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def gptq_tensors(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """What stands for `<name>.weight` in the file."""
    assert matrix.integers is not None
    assert matrix.scale is not None
    assert matrix.zero_point is not None
    scheme, columns = matrix.scheme, matrix.integers.shape[1]
    shift = 2 ** (scheme.bits - 1) if scheme.symmetric else 0
    groups = matrix.scale.shape[1]
    zeros = (matrix.zero_point + shift).T  # (groups, d_out)
    tensors = {
        "qweight": packed_bits((matrix.integers.to(torch.int16) + shift).T, scheme.bits),
        "qzeros": packed_bits(zeros.T, scheme.bits).T,
        "scales": matrix.scale.T.half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
    return {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items()}


def with_half_steps(name: str, matrix: QuantizedMatrix, dtype: torch.dtype) -> QuantizedMatrix:
    """The same with its steps as float16 keeps them, which is what the layout has, and the layer's type, too.

    Raises:
        MisconfigurationException: a step overflows in float16.
    """
    assert matrix.scale is not None
    half = matrix.scale.to(dtype).half().to(matrix.scale.dtype)
    if not bool(half.isfinite().all()):
        raise MisconfigurationException(
            f"A step of '{name}' is too large for float16, in which GPTQ's layout keeps it. Export it as "
            "dense."
        )
    return replace(matrix, scale=half)
