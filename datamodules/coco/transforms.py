"""The two published augmentation recipes of DECO and DECO+, with torchvision's transforms v2.

A sample goes through as a dictionary: `image` (Pillow's, at the end uint8 (3, H, W)), `boxes` (n, 4) pixel
corners, `labels` (n,), maybe `masks` (n, H, W). Everything random is drawn from torch's generator.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]

_SPATIAL = ("image", "boxes", "masks")


class DetectionTransforms(ABC):
    """A recipe: what happens to the samples of training and to those of evaluation."""

    @abstractmethod
    def train(self) -> Transform:
        """The training transform."""

    @abstractmethod
    def evaluation(self) -> Transform:
        """The evaluation transform; draws nothing."""


class DecoTransforms(DetectionTransforms):
    """DECO's (DETR's) recipe: images of varying size, their shorter side drawn from a list, at times a crop.

    Args:
        short_side: of evaluation, pixels.
        max_size: most pixels of a longer side; the shorter one gives way.
        train_sides: shorter sides to draw from.
        crop_probability: share of training images that are cropped before.
        crop_sides: shorter sides to draw from before the crop.
        crop_range: least and most pixels of the crop's sides, where the image is that large.
        hflip: probability of a horizontal flip.
        augmentation: false gives training the transform of evaluation.
    """

    def __init__(
        self,
        short_side: int = 800,
        max_size: int = 1333,
        train_sides: Sequence[int] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        crop_probability: float = 0.5,
        crop_sides: Sequence[int] = (400, 500, 600),
        crop_range: tuple[int, int] = (384, 600),
        hflip: float = 0.5,
        augmentation: bool = True,
    ) -> None:
        self.short_side = short_side
        self.max_size = max_size
        self.train_sides = tuple(train_sides)
        self.crop_probability = crop_probability
        self.crop_sides = tuple(crop_sides)
        self.crop_range = tuple(crop_range)
        self.hflip = hflip
        self.augmentation = augmentation

    def train(self) -> Transform:
        """Flip; then resize, or resize, crop and resize."""
        return self._train if self.augmentation else self._evaluate

    def evaluation(self) -> Transform:
        """Resize to `short_side`."""
        return self._evaluate

    def _train(self, sample: Sample) -> Sample:
        from torchvision.transforms.v2 import functional

        if _chance(self.hflip):
            sample = _everywhere(functional.horizontal_flip, sample)
        if _chance(self.crop_probability):
            sample = resize_short_side(sample, _choice(self.crop_sides))
            sample = random_crop(sample, *self.crop_range)
        return _finished(resize_short_side(sample, _choice(self.train_sides), self.max_size))

    def _evaluate(self, sample: Sample) -> Sample:
        return _finished(resize_short_side(sample, self.short_side, self.max_size))


class DecoPlusTransforms(DetectionTransforms):
    """DECO+'s (RT-DETR's) recipe: photometric distortion, zoom out, IoU crop, flip, a fixed square.

    Args:
        side: of the square, pixels; the aspect ratio is not kept.
        distort: probability of the photometric distortion.
        zoom_out: probability of a larger black canvas, one to four times as large.
        iou_crop: probability of a crop that leaves enough of some object.
        hflip: probability of a horizontal flip.
        min_size: objects with a shorter side, pixels, are dropped in training.
        augmentation: false gives training the transform of evaluation.
    """

    def __init__(
        self,
        side: int = 640,
        distort: float = 0.8,
        zoom_out: float = 0.5,
        iou_crop: float = 0.8,
        hflip: float = 0.5,
        min_size: float = 1.0,
        augmentation: bool = True,
    ) -> None:
        self.side = side
        self.distort = distort
        self.zoom_out = zoom_out
        self.iou_crop = iou_crop
        self.hflip = hflip
        self.min_size = min_size
        self.augmentation = augmentation

    def train(self) -> Transform:
        """The whole recipe."""
        if not self.augmentation:
            return self._evaluate
        from torchvision.transforms import v2

        steps = v2.Compose(
            [
                v2.RandomPhotometricDistort(p=self.distort),
                v2.RandomZoomOut(fill=0, p=self.zoom_out),
                v2.RandomApply([v2.RandomIoUCrop()], p=self.iou_crop),
                v2.SanitizeBoundingBoxes(min_size=self.min_size),
                v2.RandomHorizontalFlip(p=self.hflip),
                v2.Resize((self.side, self.side)),
                v2.SanitizeBoundingBoxes(min_size=self.min_size),
            ]
        )
        return partial(_distorted, steps)

    def evaluation(self) -> Transform:
        """Resize to the square."""
        return self._evaluate

    def _evaluate(self, sample: Sample) -> Sample:
        from torchvision.transforms.v2 import functional

        return _finished(_everywhere(functional.resize, sample, [self.side, self.side]))


# Steps


def short_side_size(width: int, height: int, side: int, max_size: int | None = None) -> tuple[int, int]:
    """(height, width) of an image with the shorter side `side`, or less where the longer passes `max_size`.

    The longer side is truncated to whole pixels, and an image that has its shorter side already is left as it
    is (DETR's rule).
    """
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * side > max_size:
        side = round(max_size * short / long)
    if short == side:
        return height, width
    other = int(side * long / short)
    return (other, side) if width < height else (side, other)


def resize_short_side(sample: Sample, side: int, max_size: int | None = None) -> Sample:
    """Resize bilinearly by `short_side_size`."""
    from torchvision.transforms.v2 import functional

    width, height = sample["image"].size
    size = short_side_size(width, height, side, max_size)
    return sample if size == (height, width) else _everywhere(functional.resize, sample, list(size))


def random_crop(sample: Sample, least: int, most: int) -> Sample:
    """Crop a rectangle with sides between `least` and `most` pixels, anywhere in the image."""
    width, height = sample["image"].size
    size = [_between(min(least, length), min(most, length)) for length in (height, width)]
    top, left = _between(0, height - size[0]), _between(0, width - size[1])
    return crop(sample, top, left, *size)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut out a rectangle; boxes are clipped, and objects of which nothing is left are dropped."""
    from torchvision.transforms.v2 import functional

    sample = _everywhere(functional.crop, sample, top, left, height, width)
    boxes = sample["boxes"]
    return keep_objects(sample, (boxes[:, 2:] > boxes[:, :2]).all(dim=1))


def keep_objects(sample: Sample, kept: Tensor) -> Sample:
    """The sample with the objects that a bool vector (n,) marks."""
    from torchvision.tv_tensors import wrap

    chosen = {name: sample[name] for name in ("boxes", "labels", "masks") if name in sample}
    return {
        **sample,
        **{
            name: wrap(values[kept], like=values) if name in _SPATIAL else values[kept]
            for name, values in chosen.items()
        },
    }


def _everywhere(function: Callable[..., Any], sample: Sample, *arguments: Any) -> Sample:
    """The sample with a function applied to image, boxes and masks."""
    return {**sample, **{name: function(sample[name], *arguments) for name in _SPATIAL if name in sample}}


def _distorted(steps: Callable[[Sample], Sample], sample: Sample) -> Sample:
    """What torchvision's steps make of the parts that they know, and the rest as it was."""
    parts = {name: sample[name] for name in (*_SPATIAL, "labels") if name in sample}
    return _finished({**sample, **steps(parts)})


def _finished(sample: Sample) -> Sample:
    """The image as uint8 (3, H, W), boxes and masks as plain tensors, `size` (2,) as height and width."""
    from torchvision.transforms.v2 import functional

    image = functional.pil_to_tensor(sample["image"])
    plain: Sample = {name: sample[name].as_subclass(Tensor) for name in ("boxes", "masks") if name in sample}
    return {**sample, **plain, "image": image, "size": torch.tensor(image.shape[-2:])}


def _chance(probability: float) -> bool:
    return torch.rand(()).item() < probability


def _choice(values: Sequence[int]) -> int:
    return values[_between(0, len(values) - 1)]


def _between(least: int, most: int) -> int:
    """A whole number, both ends included."""
    return int(torch.randint(least, most + 1, ()))
