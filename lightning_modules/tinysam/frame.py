"""The square that networks of SAM's kind see: what of it is picture, and how it is normalised."""

import torch
from torch import Tensor

from lightning_modules.parts.normalize import normalized

MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
"""Of images in [0, 1]."""


def inside(size: Tensor, side: int, stride: int = 1) -> Tensor:
    """Where the picture is, bool (batch, side, side): cells of `stride` pixels that are at least half in it.

    Args:
        size: (batch, 2), height and width of the pictures in the frame, pixels.
        side: of the square, cells.
        stride: pixels of a cell.
    """
    cells = (size + stride // 2) // stride
    steps = torch.arange(side, device=size.device)
    return (steps < cells[:, :1])[:, :, None] & (steps < cells[:, 1:])[:, None]


def framed(images: Tensor, picture: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images, exactly 0 outside of the pictures.

    Args:
        images: (batch, 3, side, side) in [0, 1].
        picture: bool (batch, side, side), or as a number.
        mean: (1, 3, 1, 1).
        std: likewise.
    """
    return without_padding(normalized(images, mean, std), picture)


def without_padding(images: Tensor, picture: Tensor) -> Tensor:
    """Normalised images, exactly 0 outside of the pictures; see `framed`."""
    return images * picture[:, None].to(images.dtype)
