"""Under which names `save_pretrained` writes the weights of layers."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn


def saved_names(network: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """`{layer: name in the file, without .weight}`; families whose files keep older names have others.

    Args:
        network: of transformers.
        layers: names of its layers.

    Raises:
        MisconfigurationException: a layer's weight is not one tensor of that shape in the file.
    """
    state = network.state_dict()
    names = list(state)
    # each tensor is full of its own number, and takes no memory
    marked = {
        name: torch.tensor(float(number), dtype=torch.float64).expand(state[name].shape)
        for number, name in enumerate(names)
    }
    places: dict[int, list[tuple[str, Tensor]]] = {}
    for key, tensor in _written(network, marked).items():
        if not tensor.numel():
            continue
        first = tensor[(0,) * tensor.ndim]
        if not any(tensor.stride()) or bool((tensor == first).all()):  # untouched ones are not unfolded
            places.setdefault(int(first), []).append((key, tensor))
    numbers = {name: number for number, name in enumerate(names)}
    found: dict[str, str] = {}
    for layer in layers:
        weight = f"{layer}.weight"
        there = places.get(numbers.get(weight, -1), [])
        if len(there) != 1 or there[0][1].shape != state[weight].shape or not there[0][0].endswith(".weight"):
            raise MisconfigurationException(
                f"The weight of '{layer}' is not one tensor in the files of {type(network).__name__}, so "
                "integers cannot stand in its place. Export it as dense."
            )
        found[layer] = there[0][0].removesuffix(".weight")
    return found


def _written(network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state as `save_pretrained` renames, splits and merges it."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before it, transformers wrote the names of the modules
        return state
    return revert_weight_conversion(network, dict(state))
