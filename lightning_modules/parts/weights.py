"""Networks by timm name and weights from any trusted-by-content file: plain tensors only, every key
accounted for.
"""

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.parts.students import from_timm_065

_STATE_KEYS = ("state_dict", "model", "model_state", "net", "params")
_PREFIXES = ("_orig_mod.", "module.", "network.")


def build_network(
    name: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    **model_args: Any,
) -> nn.Module:
    """A timm network.

    Args:
        name: timm model name, with or without a pretrained tag (`resnet18`,
            `vit_tiny_patch16_224.augreg_in21k`).
        weights: None for random, `pretrained` for timm's own, or a file (see `load_weights`).
        num_classes: width of the classifier; None keeps timm's.
        model_args: passed to timm (`drop_path_rate`, `img_size`, ...).

    Raises:
        ValueError: timm has no such model; near misses are listed.
        FileNotFoundError: the weights file does not exist.
    """
    if not timm.is_model(name):
        close = get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
        raise ValueError(f"timm has no model '{name}'. Near misses: {', '.join(close) or 'none'}.")
    if num_classes is not None:
        model_args["num_classes"] = num_classes
    network = timm.create_model(name, pretrained=weights == "pretrained", **model_args)
    if weights is not None and weights != "pretrained":
        load_weights(network, weights, from_timm_065)
    return network


def weights_origin(network: nn.Module, name: str, weights: str | Path | None) -> str:
    """Where the weights of a network that `build_network` made are from, for `Method.weights_origin`.

    timm leaves a classifier of another width than the pretrained one as it is: random.
    """
    if weights is None:
        return "random"
    if weights != "pretrained":
        return f"file: {weights}"
    known = getattr(network, "pretrained_cfg", {}).get("num_classes")
    same = known == getattr(network, "num_classes", None)
    return f"pretrained: {name}" if same else f"random head on pretrained: {name}"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint file, without ever running code from it.

    Args:
        path: `.safetensors`, or anything that torch wrote.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: the file needs pickled code, or cannot be read at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file '{path}'.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options: plain data
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else "it is no tensor file"
        raise MisconfigurationException(
            f"'{path}' is refused: it needs pickled code ({reason}), which could run anything. If you trust "
            "its author, "
            "convert it once: `torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)`."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise MisconfigurationException(f"'{path}' is not a readable checkpoint: {error}") from error


def state_dict_of(checkpoint: dict[str, Any], prefer_ema: bool = False) -> dict[str, Tensor]:
    """The network's state dict inside a checkpoint of ours, timm's, torchvision's or a bare one.

    Wrapper prefixes (`module.`, `network.`, `_orig_mod.`) are removed and the training-only `objectives.`
    left out. From one of our checkpoints only what lies under `network.` is the network.

    Args:
        checkpoint: what `read_checkpoint` gave.
        prefer_ema: take `state_dict_ema` where there is one.
    """
    keys = ("state_dict_ema", *_STATE_KEYS) if prefer_ema else _STATE_KEYS
    found = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    state = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if "pytorch-lightning_version" in checkpoint and any(key.startswith("network.") for key in state):
        state = {key: value for key, value in state.items() if key.startswith("network.")}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_weights(
    network: nn.Module,
    path: str | Path,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load a checkpoint file strictly into `network`.

    Args:
        network: changed in place.
        path: see `read_checkpoint`.
        convert: maps foreign names to ours.

    Raises:
        MisconfigurationException: keys are missing, unexpected or of another shape; the first of each are
            listed.
    """
    state = state_dict_of(read_checkpoint(path))
    if convert is not None:
        state = convert(state)
    fault = state_fault(network.state_dict(), state)
    if fault:
        raise MisconfigurationException(f"'{path}' does not fit {type(network).__name__}: {fault}.")
    network.load_state_dict(state)


def state_fault(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Why `state` cannot be loaded strictly where `own` is: the first keys of each kind; empty if it can."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:5])}" for kind, keys in faults.items() if keys)
