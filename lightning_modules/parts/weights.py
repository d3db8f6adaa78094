"""Networks by timm name and weights from any trusted-by-content file: plain tensors only, every key
accounted for.
"""

import argparse
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_modules.parts.students import from_timm_065

_STATE_KEYS = ("state_dict", "model", "model_state_dict", "model_state", "net", "params", "weights")
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict")
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
        MisconfigurationException: timm's own weights cannot be fetched.
    """
    if not timm.is_model(name):
        close = get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
        raise ValueError(f"timm has no model '{name}'. Near misses: {', '.join(close) or 'none'}.")
    if num_classes is not None:
        model_args["num_classes"] = num_classes
    try:
        network = timm.create_model(name, pretrained=weights == "pretrained", **model_args)
    except OSError as error:
        if weights != "pretrained":
            raise
        raise MisconfigurationException(
            f"weights: pretrained: timm's weights of '{name}' are not on this machine and cannot be fetched "
            f"({_first_line(error)}): fetch them where there is a network, or name a file."
        ) from error
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
        MisconfigurationException: the file needs pickled code, or cannot be read at all; says what it is
            where that is known (a web page, a pointer of Git LFS).
    """
    path = Path(path)
    if path.is_dir():
        raise MisconfigurationException(f"'{path}' is a folder, not a checkpoint file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file '{path}'.")
    _refuse_what_is_no_file_of_tensors(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options: plain data
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and safetensors raise nearly anything on damaged files
        found = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and (found or "Unsupported operand" in str(error)):
            named = f" (it names {found[1]})" if found else ""
            raise MisconfigurationException(
                f"'{path}' is refused: it needs pickled code{named}, which could run anything. If you trust "
                "its author, convert it once, where it came from, to a file of plain tensors."
            ) from error
        raise MisconfigurationException(
            f"'{path}' is damaged, incomplete or no checkpoint: torch cannot read it ({_first_line(error)})."
        ) from error
    if not isinstance(content, dict):
        raise MisconfigurationException(
            f"'{path}' holds a {type(content).__name__}, where a checkpoint is a dictionary of tensors."
        )
    return content


def _refuse_what_is_no_file_of_tensors(path: Path) -> None:
    """Name what stands there instead of weights, where its first bytes say so."""
    with path.open("rb") as file:
        start = file.read(64)
    reason = None
    if not start:
        reason = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        reason = "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page, not weights: the download went wrong"
    if reason:
        raise MisconfigurationException(f"'{path}' {reason}.")


def _first_line(error: Exception) -> str:
    """The reason without torch's advice, which is to run the code."""
    line = str(error).strip().partition("\n")[0].partition(". ")[0]
    if "weights_only" in line or not line:
        return type(error).__name__
    return line.rstrip(".")


def state_dict_of(
    checkpoint: dict[str, Any], prefer_ema: bool = False, source: str | Path = "the checkpoint"
) -> dict[str, Tensor]:
    """The network's state dict inside a checkpoint of ours, timm's, torchvision's or a bare one.

    Wrapper prefixes (`module.`, `network.`, `_orig_mod.`) are removed and the training-only `objectives.`
    left out. From one of our checkpoints only what lies under `network.` is the network.

    Args:
        checkpoint: what `read_checkpoint` gave.
        prefer_ema: take `state_dict_ema` where there is one; otherwise it is taken where nothing else is.
        source: what the checkpoint was read from, for the error.

    Raises:
        MisconfigurationException: there are no weights under a known name; names the keys that are there.
    """
    keys = (_EMA_KEYS + _STATE_KEYS) if prefer_ema else (_STATE_KEYS + _EMA_KEYS)
    found = next((checkpoint[key] for key in keys if _tensors(checkpoint.get(key))), checkpoint)
    state = _tensors(found)
    if not state:
        nested = [value for value in checkpoint.values() if isinstance(value, dict) and _is_state(value)]
        if len(nested) != 1:
            listed = ", ".join(map(str, list(checkpoint)[:8])) or "none"
            raise MisconfigurationException(
                f"'{source}' holds no weights under a known name such as {', '.join(_STATE_KEYS[:3])}; its "
                f"keys are {listed}{', ...' if len(checkpoint) > 8 else ''}."
            )
        state = dict(nested[0])
    if "pytorch-lightning_version" in checkpoint and any(key.startswith("network.") for key in state):
        state = {key: value for key, value in state.items() if key.startswith("network.")}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _tensors(content: Any) -> dict[str, Tensor]:
    """What of a dictionary is a tensor under a name."""
    if not isinstance(content, dict):
        return {}
    return {
        key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)
    }


def _is_state(content: dict[Any, Any]) -> bool:
    """Whether a dictionary holds tensors by name, and nothing else."""
    return bool(content) and len(_tensors(content)) == len(content)


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
    state = state_dict_of(read_checkpoint(path), source=path)
    load_state(network, state if convert is None else convert(state), path)


def load_state(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors strictly into `network`.

    Args:
        network: changed in place.
        state: tensors by the network's names.
        source: where they come from, for the error.

    Raises:
        MisconfigurationException: keys are missing, unexpected or of another shape; the first of each are
            listed.
    """
    fault = state_fault(network.state_dict(), state)
    if fault:
        raise MisconfigurationException(f"'{source}' does not fit {type(network).__name__}: {fault}.")
    network.load_state_dict(state)


def examples(keys: Sequence[str], count: int = 5) -> str:
    """Some of many keys, of as many parts of the network as possible."""
    parts: dict[str, str] = {}
    for key in keys:
        parts.setdefault(key.partition(".")[0], key)
    first = [*parts.values(), *(key for key in keys if key not in parts.values())][:count]
    chosen = sorted(first, key=list(keys).index)
    return ", ".join(chosen) + (" and others" if len(keys) > count else "")


def state_fault(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Why `state` cannot be loaded strictly where `own` is: some keys of each kind; empty if it can."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(keys)} {kind}: {examples(keys)}" for kind, keys in faults.items() if keys)
