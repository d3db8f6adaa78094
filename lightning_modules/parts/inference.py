"""What is deployed of a module, and what it takes."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class InferencePath(nn.Module):
    """The part of a module that is deployed: `network(normalize(images))`, or `forward` without a `network`.

    Holds the module's own parts, not copies.

    Args:
        module: the LightningModule; its attribute `network` and method `normalize` are used if it has them.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.network = student_of(module)
        self._normalize = getattr(module, "normalize", None) if self.network is not module else None

    def forward(self, *inputs: Tensor) -> Any:
        """Output of the network; the first input is normalised where the module knows how."""
        first, *others = inputs
        if self._normalize is not None and first.is_floating_point():
            first = self._normalize(first)
        return self.network(first, *others)


def student_of(module: LightningModule) -> nn.Module:
    """What is deployed of a module: its `network`, or itself where it has none."""
    network = getattr(module, "network", None)
    return network if isinstance(network, nn.Module) else module


def inputs_of(module: nn.Module, batch: Any) -> tuple[Tensor, ...] | None:
    """The tensors of `batch` that inference takes, batch first; None where that is not known.

    A module whose network takes something else than `image` or `input_ids` says so in a method
    `inference_inputs(batch) -> tuple[Tensor, ...]`.
    """
    if callable(own := getattr(module, "inference_inputs", None)):
        return tuple(own(batch))
    if isinstance(batch, Mapping):
        for key in ("image", "input_ids"):
            if isinstance(batch.get(key), Tensor):
                return (batch[key],)
    return None


def repeat_to(tensor: Tensor, batch_size: int) -> Tensor:
    """(n, ...) to (batch_size, ...), going round as often as needed."""
    places = torch.arange(batch_size, device=tensor.device) % len(tensor)
    return tensor[places]
