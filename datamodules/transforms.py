"""Image transforms of training and evaluation, from timm's parts, without normalisation.

What leaves here is uint8; the loader's collation makes float32 in [0, 1] of it. Normalisation, random
erasing, mixup and cutmix work on whole batches and belong to the module.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | NDArray[np.uint8]
"""An RGB image: Pillow's, or an array (H, W, 3)."""

Interpolation = Literal["bilinear", "bicubic"]

PINNED: dict[str, tuple[float, Interpolation]] = {
    "resnet18": (0.875, "bilinear"),
    "resnet50": (0.95, "bicubic"),
    "mobilenetv2*": (0.875, "bicubic"),
    "resmlp_12*": (0.875, "bicubic"),
    "mixer_b16*": (0.875, "bicubic"),
    "convnext_tiny": (0.875, "bicubic"),
    "deit_*": (0.9, "bicubic"),
    "vit_*": (0.9, "bicubic"),
    "swin_*": (0.9, "bicubic"),
}
"""crop_pct and interpolation of evaluation by model name (globs), as of timm 0.6.5, where the papers' numbers
were made.

timm 1.0 changed some of its defaults (resnet18 and convnext_tiny to 0.95). A name with a tag, such as
``resnet18.a1_in1k``, asks for particular weights and gets their own values, and so does a model for 384
pixels.
"""


@dataclass(frozen=True)
class ImageTransforms:
    """How images are cropped and augmented in training, and cropped in evaluation.

    Args:
        image_size: height and width of what the network sees, pixels.
        augmentation: "none" gives the images of evaluation in training, too.
        train_crop: "random_resized" (Inception style) or "pad": a random crop after padding by ``padding``,
            for images that have ``image_size`` already, such as CIFAR at 32.
        scale: range of the random crop's area, as a part of the image.
        ratio: range of its aspect ratio.
        train_interpolation: of the random crop; "random" draws bilinear or bicubic for each image.
        padding: black pixels on each side for ``train_crop: pad``.
        hflip: probability of a horizontal flip.
        color_jitter: strength for brightness, contrast and saturation; ignored with ``auto_augment``, as in
            timm.
        auto_augment: timm's string, such as ``rand-m9-mstd0.5-inc1``; null for none.
        fill: RGB in [0, 1] for what geometric operations of ``auto_augment`` uncover.
        model: timm's name of the network: chooses what ``crop_pct`` and ``interpolation`` leave open.
        crop_pct: evaluation resizes the shorter side to floor(image_size / crop_pct) and crops the centre.
            null: from ``model``; without a model 0.875, and 1 with ``train_crop: pad``.
        interpolation: of that resize; null: from ``model``, else bilinear.
    """

    image_size: int = 224
    augmentation: Literal["standard", "none"] = "standard"
    train_crop: Literal["random_resized", "pad"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    train_interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    padding: int = 4
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    fill: tuple[float, float, float] = (0.485, 0.456, 0.406)
    model: str | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}.")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is a probability, got {self.hflip}.")

    def train(self) -> Callable[[Picture], Tensor]:
        """The training transform: a picture to uint8 (3, image_size, image_size)."""
        if self.augmentation == "none":
            return self.evaluation()
        if self.train_crop == "pad":
            crop = PadCropFlip(self.image_size, self.padding, self.hflip)
            extra = self._augmentations()
            return Chain(crop, *([to_image, *extra] if extra else []), to_tensor)
        return Chain(to_image, *self._crops(), *self._augmentations(), to_tensor)

    def evaluation(self) -> Callable[[Picture], Tensor]:
        """The evaluation transform: a picture to uint8 (3, image_size, image_size)."""
        from timm.data.transforms_factory import create_transform

        crop_pct, interpolation = self.evaluation_crop()
        resize_and_crop = create_transform(
            self.image_size, crop_pct=crop_pct, interpolation=interpolation, normalize=False
        )
        # contiguous: whether a batch is channels-last must not depend on the number of workers
        transform = Chain(to_image, resize_and_crop, Tensor.contiguous)
        return UnlessFitting(self.image_size, transform) if crop_pct == 1 else transform

    def evaluation_crop(self) -> tuple[float, Interpolation]:
        """crop_pct and interpolation of evaluation: as set, else as the model wants them."""
        if self.crop_pct is not None and self.interpolation is not None:
            return self.crop_pct, self.interpolation
        if self.train_crop == "pad":
            chosen: tuple[float, Interpolation] = (1.0, "bilinear")
        else:
            chosen = (0.875, "bilinear") if self.model is None else model_crop(self.model)
        return self.crop_pct or chosen[0], self.interpolation or chosen[1]

    def _parts(self) -> tuple[Any, Any, Any]:
        from timm.data.transforms_factory import create_transform

        return create_transform(
            self.image_size,
            is_training=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.train_interpolation,
            mean=self.fill,
            normalize=False,
            separate=True,
        )

    def _crops(self) -> list[Callable[[Any], Any]]:
        return list(self._parts()[0].transforms)

    def _augmentations(self) -> list[Callable[[Any], Any]]:
        steps = list(self._parts()[1].transforms) if self.auto_augment or self.color_jitter else []
        for step in steps:
            _allow_zero_bits(step)
        return steps


@cache
def model_crop(model: str) -> tuple[float, Interpolation]:
    """crop_pct and interpolation that evaluate ``model``: from ``PINNED``, else from timm's pretrained
    configuration.

    Which of them is logged, once.
    """
    if "." not in model and "384" not in model:
        for pattern, pinned in PINNED.items():
            if fnmatch(model, pattern):
                rank_zero_info(
                    f"{model} is evaluated with crop_pct {pinned[0]} and {pinned[1]} resizing (pinned)."
                )
                return pinned
    from timm.models import get_pretrained_cfg, is_model

    architecture = model.partition(".")[0]
    config = get_pretrained_cfg(model, allow_unregistered=True) if is_model(architecture) else None
    if config is None:
        rank_zero_info(
            f"timm does not know {model}: it is evaluated with crop_pct 0.875 and bilinear resizing."
        )
        return 0.875, "bilinear"
    interpolation: Interpolation = "bicubic" if config.interpolation == "bicubic" else "bilinear"
    rank_zero_info(
        f"{model} is evaluated with crop_pct {config.crop_pct} and {interpolation} resizing (from timm)."
    )
    return float(config.crop_pct), interpolation


def _allow_zero_bits(transform: Any) -> None:
    """Makes timm's posterizing work with Pillow 13, which refuses 0 bits, as ``m9-mstd0.5-inc1`` may want.

    Older ones gave a black image, which is what the recipes were made with.
    """
    from timm.data import auto_augment

    operations = [*getattr(transform, "ops", []), *chain(*getattr(transform, "policy", []))]
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(bits, 8)) if bits > 0 else Image.new(image.mode, image.size)


class Chain:
    """Applies functions one after the other."""

    def __init__(self, *steps: Callable[[Any], Any]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        """``value`` after all of them."""
        for step in self.steps:
            value = step(value)
        return value


class PadCropFlip:
    """Random crop of ``size`` after zero padding, then a random horizontal flip, on the array itself.

    The result is that of torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, at a fraction of
    the time. It draws from Python's ``random``. An image of another size is first resized to size x size.
    """

    def __init__(self, size: int, padding: int, hflip: float) -> None:
        self.size, self.padding, self.hflip = size, padding, hflip

    def __call__(self, picture: Picture) -> NDArray[np.uint8]:
        """uint8 (size, size, 3)."""
        size, padding = self.size, self.padding
        array = to_array(picture)
        if array.shape[:2] != (size, size):
            array = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BILINEAR))
        top, left = random.randint(-padding, padding), random.randint(-padding, padding)
        crop = np.zeros((size, size, 3), np.uint8)
        crop[max(-top, 0) : size - max(top, 0), max(-left, 0) : size - max(left, 0)] = array[
            max(top, 0) : size + min(top, 0), max(left, 0) : size + min(left, 0)
        ]
        return crop[:, ::-1] if random.random() < self.hflip else crop


class UnlessFitting:
    """Skips ``transform`` for arrays that have the wanted size already: nothing to resize, no image object to
    make.
    """

    def __init__(self, size: int, transform: Callable[[Picture], Tensor]) -> None:
        self.size, self.transform = size, transform

    def __call__(self, picture: Picture) -> Tensor:
        """uint8 (3, size, size)."""
        fits = isinstance(picture, np.ndarray) and picture.shape[:2] == (self.size, self.size)
        return to_tensor(picture) if fits else self.transform(picture)


def to_image(picture: Picture) -> Image.Image:
    """Pillow's image of an array (H, W, 3), or the image itself."""
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def to_array(picture: Picture) -> NDArray[np.uint8]:
    """The array (H, W, 3) of Pillow's image, or the array itself."""
    return picture if isinstance(picture, np.ndarray) else np.asarray(picture)


def to_tensor(picture: Picture) -> Tensor:
    """uint8 (3, H, W), a copy that owns its memory."""
    return torch.from_numpy(np.ascontiguousarray(to_array(picture).transpose(2, 0, 1)))
