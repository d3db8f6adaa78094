"""The normalisation of images as part of a module, so that it moves to the module's device with it."""

from collections.abc import Sequence

import torch
from torch import nn


def register_normalization(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Give `module` the buffers `mean` and `std`, (1, 3, 1, 1) each; no checkpoint has them.

    Args:
        module: that normalises images in [0, 1].
        mean: of each channel.
        std: of each channel.
    """
    for name, values in (("mean", mean), ("std", std)):
        module.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
