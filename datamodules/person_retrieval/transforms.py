"""Pictures of people to tensors: both sides resized, and the augmentation of IRRA."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F
from torchvision.transforms import v2

CLIP_MEAN_GREY = (156, 147, 132)
"""What IRRA's erasing writes, CLIP's mean triple after normalisation, in 8 bits."""


@dataclass(frozen=True)
class PersonTransforms:
    """Resizing without keeping the aspect, and IRRA's augmentation.

    Args:
        image_size: height and width, pixels.
        augment: flip, pad and crop, and erase.
        erase: probability of erasing.
        erase_value: `mean` is what IRRA writes; `zero` is black.
    """

    image_size: tuple[int, int] = (384, 128)
    augment: bool = True
    erase: float = 0.5
    erase_value: Literal["mean", "zero"] = "mean"

    def train(self) -> Callable[[Image.Image], Tensor]:
        """From a picture to uint8 (3, height, width)."""
        return _Drawn(self) if self.augment else _Resized(self.image_size, hflip=0.5)

    def evaluation(self) -> Callable[[Image.Image], Tensor]:
        """The same without chance."""
        return _Resized(self.image_size)


@dataclass(frozen=True)
class _Resized:
    size: tuple[int, int]
    hflip: float = 0.0

    def __call__(self, picture: Image.Image) -> Tensor:
        picture = picture.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if self.hflip and random.random() < self.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return F.pil_to_tensor(picture)


@dataclass(frozen=True)
class _Drawn:
    options: PersonTransforms

    def __call__(self, picture: Image.Image) -> Tensor:
        options = self.options
        image = F.pad(_Resized(options.image_size, 0.5)(picture), [10])
        image = v2.RandomCrop(options.image_size)(image)
        value = list(CLIP_MEAN_GREY) if options.erase_value == "mean" else [0]
        return v2.RandomErasing(options.erase, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=value)(image)
