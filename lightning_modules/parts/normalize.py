"""The normalisation of images: by buffers of a module, which move to its device with it, or by numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn


class Statistics(NamedTuple):
    """What images in [0, 1] are normalised with: a number for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalized(images: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tensor:
    """Images minus the mean of their channel, over its standard deviation; same shape.

    Args:
        images: (..., channels, height, width) in [0, 1].
        mean: of each channel: numbers, or a tensor (1, channels, 1, 1) as `register_normalization` makes it.
        std: likewise.
    """
    return (images - _of_channels(mean, images)) / _of_channels(std, images)


def restored(images: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tensor:
    """The inverse of `normalized`."""
    return images * _of_channels(std, images) + _of_channels(mean, images)


def register_normalization(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Give `module` the buffers `mean` and `std`, (1, 3, 1, 1) each; no checkpoint has them.

    Args:
        module: that normalises images in [0, 1].
        mean: of each channel.
        std: of each channel.
    """
    for name, values in (("mean", mean), ("std", std)):
        module.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)


def trained_statistics(network: nn.Module) -> Statistics:
    """What a network of timm was trained with; ImageNet's where it does not say, see `knows_statistics`."""
    config = resolve_data_config(model=network)
    return Statistics(tuple(config["mean"]), tuple(config["std"]))


def knows_statistics(network: nn.Module) -> bool:
    """Whether a network says what it was trained with, as timm's do."""
    return bool(getattr(network, "pretrained_cfg", None))


def _of_channels(values: Tensor | Sequence[float], images: Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else images.new_tensor(values).view(-1, 1, 1)
