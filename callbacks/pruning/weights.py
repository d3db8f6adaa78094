"""The weights that a pruning callback acts on, with all that hangs on them: gradients, states, averages."""

from collections.abc import Sequence
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from callbacks.pruning.masks import MaskBook


class PrunedWeights:
    """The weights of some layers.

    Args:
        layers: by the name of the weight.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.parameters = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
        self._identities = {id(parameter) for parameter in self.parameters.values()}

    def same_as(self, other: "PrunedWeights") -> bool:
        """Whether these are the very same parameters under the same names."""
        return self.parameters.keys() == other.parameters.keys() and self._identities == other._identities

    def shared_with(self, other: "PrunedWeights") -> list[str]:
        """Names, in the other, of the parameters that both have."""
        return [name for name, weight in other.parameters.items() if id(weight) in self._identities]

    def owned_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimiser updates any of them."""
        groups = optimizer.param_groups
        return any(id(parameter) in self._identities for group in groups for parameter in group["params"])

    def gradients(self) -> dict[str, Tensor]:
        """By name; weights that the loss did not use are missing."""
        return {name: weight.grad for name, weight in self.parameters.items() if weight.grad is not None}

    def has_finite_gradients(self) -> bool | None:
        """Whether all gradients are finite; None where there are none."""
        gradients = self.gradients().values()
        if not gradients:
            return None
        return bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all())

    def clear(self, masks: MaskBook, averages: Sequence[nn.Module]) -> None:
        """True zeros at the dead weights, also in averaged copies of the module."""
        masks.clear(self.parameters)
        for average in averages:
            copies = dict(average.named_parameters())
            masks.clear({name: copies[name] for name in self.parameters if name in copies})


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """The averaged copies of the module that other callbacks keep (Lightning's WeightAveraging and SWA)."""
    averages = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            averages.append(average.module if isinstance(average, AveragedModel) else average)
    return averages
