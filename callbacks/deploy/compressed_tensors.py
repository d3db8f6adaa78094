"""A quantized model as a folder that other programs load: `dense`, `compressed-tensors` or `gptq` (section 7
of the spec).
"""

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from callbacks.deploy.gptq import gptq_config, gptq_tensors
from callbacks.deploy.saved_names import saved_names
from callbacks.quantization.experts import Expert
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.scheme import Scheme
from callbacks.run.directory import replace_folder

ExportFormat = Literal["dense", "compressed-tensors", "gptq"]


def export_model(
    folder: Path,
    network: nn.Module,
    tokenizer: Any,
    matrices: Mapping[str, QuantizedMatrix],
    form: ExportFormat,
) -> dict[str, Any]:
    """Write an ordinary Hugging Face folder.

    Args:
        folder: is made; an older one is replaced once the new one is whole.
        network: with hard weights, as quantization leaves it.
        tokenizer: saved beside it; None for none.
        matrices: the integers of each quantized layer.
        form: `dense` keeps plain weights (activations are then not quantized by who loads it);
            `compressed-tensors` and `gptq` keep integers and steps.

    Returns:
        `path`, `format` and `bytes_on_disk` of all weight files.

    Raises:
        MisconfigurationException: the format cannot express what was done; says what can.
    """
    config = expressed(form, network, matrices)  # refuses before anything is written
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _save_dense(partial, network, tokenizer)
    found = {"path": str(folder), "format": form}
    if config is not None:
        dtype = next(network.parameters()).dtype
        _compress(partial, matrices, config, saved_names(network, matrices), dtype)
        found["packing"] = str(config.get("format", config.get("checkpoint_format")))
    replace_folder(partial, folder)
    return found | {"bytes_on_disk": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def expressed(
    form: ExportFormat, network: nn.Module, matrices: Mapping[str, QuantizedMatrix]
) -> dict[str, Any] | None:
    """`quantization_config` of a format; None for plain weights.

    Raises:
        MisconfigurationException: the format cannot express what was done.
    """
    if form == "dense":
        return None
    return (compression_config if form == "compressed-tensors" else gptq_config)(network, matrices)


def _save_dense(folder: Path, network: nn.Module, tokenizer: Any) -> None:
    config = network.config
    if getattr(config, "quantization_config", None) is not None:
        raise MisconfigurationException(
            "The model calls itself quantized already: its config has a quantization_config."
        )
    network.save_pretrained(folder)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def form_of(scheme: Scheme) -> Literal["pack-quantized", "int-quantized"]:
    """The layout that holds a scheme; asymmetric packed weights load in no current transformers."""
    return "pack-quantized" if scheme.symmetric and scheme.activation_bits >= 16 else "int-quantized"


def compression_config(network: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> dict[str, Any]:
    """`quantization_config` of the exported folder.

    Raises:
        MisconfigurationException: a layer cannot be expressed, or the package that packs weights is missing.
    """
    if any(isinstance(part, Expert) for part in network.modules()):
        raise MisconfigurationException(
            f"compressed-tensors cannot express {type(network).__name__}: it keeps its experts as 3-D "
            "parameters, which no loader takes from that format. Export it as dense."
        )
    saved_names(network, matrices)
    groups: dict[Scheme, list[str]] = {}
    for name, matrix in matrices.items():
        _refuse(name, matrix, network.get_submodule(name))
        groups.setdefault(matrix.scheme, []).append(name)
    forms = {form_of(scheme) for scheme in groups}
    if "pack-quantized" in forms and importlib.util.find_spec("compressed_tensors") is None:
        raise MisconfigurationException(
            "Packed weights need the package compressed-tensors, to be written as to be loaded: "
            "pip install featherlight[llm], or export them as dense."
        )
    common = "pack-quantized" if forms == {"pack-quantized"} else "int-quantized"
    if len(forms) > 1:
        common = "mixed-precision"
    ignored = [
        name for name, part in network.named_modules() if isinstance(part, nn.Linear) and name not in matrices
    ]
    alone = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": common,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": _group(scheme, ["Linear"] if alone else names)
            for number, (scheme, names) in enumerate(groups.items())
        },
        "ignore": ignored,
    }


def _refuse(name: str, matrix: QuantizedMatrix, layer: nn.Module) -> None:
    scheme = matrix.scheme
    reason = None
    if matrix.integers is None:
        reason = "its weights are not quantized"
    elif type(layer) is not nn.Linear:
        reason = f"it is a {type(layer).__name__}, not a Linear"
    elif scheme.activation_mode == "static_tensor" and scheme.activation_bits < 16:
        reason = "static activation steps were never verified to load"
    elif scheme.activation_mode == "dynamic_token_asymmetric" and scheme.activation_bits < 16:
        reason = "no runtime has zero points of activations"
    elif scheme.activation_bits < 16 and (not scheme.symmetric or scheme.group_size != -1):
        reason = "integer runtimes want quantized activations with symmetric weights per channel"
    if reason is not None:
        raise MisconfigurationException(
            f"compressed-tensors cannot express layer '{name}' ({scheme}): {reason}. Export it as dense."
        )


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
    }
    activations = None
    if scheme.activation_bits < 16:
        activations = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": form_of(scheme),
    }


def _compress(
    folder: Path,
    matrices: Mapping[str, QuantizedMatrix],
    config: dict[str, Any],
    names: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Replace the dense weights of a folder by integers.

    Args:
        folder: written by `save_pretrained`.
        matrices: the integers of each quantized layer.
        config: `quantization_config`.
        names: of the layers in the files.
        dtype: of the dense weights, in which steps are kept.

    Raises:
        MisconfigurationException: a layer is not in the files, or its weight there is another.
    """
    layers = {saved: name for name, saved in names.items()}
    missing = set(layers)
    files = sorted(folder.glob("*.safetensors"))
    index: dict[str, str] = {}
    total = 0
    for file in files:
        state = load_file(file)
        for saved in [key.removesuffix(".weight") for key in state]:
            if saved in layers:
                matrix, weight = matrices[layers[saved]], state.pop(f"{saved}.weight")
                if torch.equal(weight, matrix.weight(weight.dtype).to("cpu", weight.dtype)):
                    missing.discard(saved)
                gptq = config["quant_method"] == "gptq"
                state |= gptq_tensors(saved, matrix) if gptq else packed_tensors(saved, matrix, dtype)
        save_file(state, file, metadata={"format": "pt"})
        index |= dict.fromkeys(state, file.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if missing:
        raise MisconfigurationException(
            f"{len(missing)} of {len(layers)} quantized layers are not in the files as they are in the model "
            f"({', '.join(sorted(missing)[:4])}). Export it as dense."
        )
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        listing.write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
        )
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"quantization_config": config}
    path.write_text(json.dumps(content, indent=2) + "\n")


def packed_tensors(
    name: str, matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What stands for `<name>.weight` of type `dtype` in the file."""
    assert matrix.integers is not None
    assert matrix.scale is not None
    assert matrix.zero_point is not None
    shift = 0 if matrix.scheme.symmetric else 2 ** (matrix.scheme.bits - 1)
    integers = (matrix.integers.to(torch.int16) - shift).to(torch.int8).cpu().contiguous()
    tensors = {f"{name}.weight_scale": matrix.scale.to(dtype).cpu().contiguous()}
    if form_of(matrix.scheme) == "pack-quantized":
        from compressed_tensors import pack_to_int32  # of the extra, and slow to import

        tensors[f"{name}.weight_packed"] = pack_to_int32(integers, matrix.scheme.bits)
        tensors[f"{name}.weight_shape"] = torch.tensor(integers.shape, dtype=torch.int64)
        return tensors
    tensors[f"{name}.weight"] = integers
    if not matrix.scheme.symmetric:
        tensors[f"{name}.weight_zero_point"] = (matrix.zero_point - shift).to(torch.int8).cpu().contiguous()
    return tensors
