"""Crops, blur and JPEG of images that may be generated; degradations for robustness tests."""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from datamodules.transforms import Interpolation, to_tensor

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur of each channel, in floating point and rounded once."""
    pixels = gaussian_filter(np.asarray(image, np.float32), (sigma, sigma, 0))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """The image after a JPEG of that quality, by Pillow's encoder."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")


def resized(image: Image.Image, side: int, interpolation: Interpolation = "bilinear") -> Image.Image:
    """The image with its shorter side scaled to `side` pixels."""
    width, height = image.size
    if min(width, height) == side:
        return image
    factor = side / min(width, height)
    size = max(side, round(width * factor)), max(side, round(height * factor))
    return image.resize(size, RESAMPLING[interpolation])


def crop(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    """A square of the image; what lies outside of it is black."""
    return image.crop((left, top, left + size, top + size))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle; a smaller image is padded with black."""
    return crop(image, size, round((image.width - size) / 2), round((image.height - size) / 2))


@dataclass(frozen=True)
class Degradation:
    """What the images of a robustness test go through before the usual transform, in this order.

    Args:
        low_resolution: the shorter side is scaled down to so many pixels (GenImage: 112, 64).
        blur_sigma: Gaussian blur, pixels (GenImage: 3, 5).
        jpeg_quality: JPEG compression (GenImage: 65, 30).
    """

    low_resolution: int | None = None
    blur_sigma: float | None = None
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"degradation.jpeg_quality must be in 1..100, got {self.jpeg_quality}.")

    def __call__(self, image: Image.Image) -> Image.Image:
        """The degraded image."""
        if self.low_resolution is not None:
            image = resized(image, self.low_resolution)
        if self.blur_sigma is not None:
            image = blurred(image, self.blur_sigma)
        if self.jpeg_quality is not None:
            image = compressed(image, self.jpeg_quality)
        return image


@dataclass(frozen=True)
class FakeImageTransforms:
    """From an image file to what the encoder sees; real and generated images are treated alike.

    Args:
        image_size: of the crop, pixels.
        resize: the shorter side in evaluation; null crops without resizing (UniversalFakeDetect).
        train_resize: the shorter side in training; null does not resize.
        interpolation: of both.
        augmentation: "none" trains on the crops of evaluation.
        train_crop: of training.
        hflip: probability of a flip.
        blur_probability: of a Gaussian blur.
        blur_sigma: range of its sigma, pixels.
        jpeg_probability: of a JPEG compression.
        jpeg_quality: range of its quality.
        unbias_jpeg: first of all, JPEG compression of this quality for every image of every split: takes the
            file format out of GenImage, whose reals are JPEG and fakes PNG (Grommelt et al. 2024). Another
            protocol than the published one.
        unbias_size: before that, the shorter side of every image is scaled to so many pixels.
    """

    image_size: int = 224
    resize: int | None = None
    train_resize: int | None = 256
    interpolation: Interpolation = "bilinear"
    augmentation: Literal["standard", "none"] = "standard"
    train_crop: Literal["random", "center"] = "random"
    hflip: float = 0.5
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.0, 3.0)
    jpeg_probability: float = 0.5
    jpeg_quality: tuple[int, int] = (30, 100)
    unbias_jpeg: int | None = None
    unbias_size: int | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"transforms.image_size must be positive, got {self.image_size}.")
        for name in ("hflip", "blur_probability", "jpeg_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"transforms.{name} is a probability, got {getattr(self, name)}.")

    def train(self) -> Callable[[Image.Image], Tensor]:
        """The random transform of training: an image to uint8 (3, image_size, image_size)."""
        return self.evaluation() if self.augmentation == "none" else _Training(self)

    def evaluation(self, degradation: Degradation = Degradation()) -> Callable[[Image.Image], Tensor]:
        """The transform of evaluation, the same for an image every time."""
        return _Evaluation(self, degradation)

    def unbiased(self, image: Image.Image) -> Image.Image:
        """The image after `unbias_size` and `unbias_jpeg`."""
        if self.unbias_size is not None:
            image = resized(image, self.unbias_size, self.interpolation)
        return image if self.unbias_jpeg is None else compressed(image, self.unbias_jpeg)


@dataclass(frozen=True)
class _Evaluation:
    transforms: FakeImageTransforms
    degradation: Degradation

    def __call__(self, image: Image.Image) -> Tensor:
        options = self.transforms
        image = self.degradation(options.unbiased(image))
        if options.resize is not None:
            image = resized(image, options.resize, options.interpolation)
        return to_tensor(centre_crop(image, options.image_size))


@dataclass(frozen=True)
class _Training:
    transforms: FakeImageTransforms

    def __call__(self, image: Image.Image) -> Tensor:
        options = self.transforms
        image = options.unbiased(image)
        if options.train_resize is not None:
            image = resized(image, options.train_resize, options.interpolation)
        if random.random() < options.blur_probability:
            image = blurred(image, random.uniform(*options.blur_sigma))
        if random.random() < options.jpeg_probability:
            image = compressed(image, random.randint(*options.jpeg_quality))
        size = options.image_size
        if options.train_crop == "center":
            image = centre_crop(image, size)
        else:
            left = _position(image.width - size)
            image = crop(image, size, left, _position(image.height - size))
        if random.random() < options.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)


def _position(room: int) -> int:
    """A random corner; a smaller image lies in the middle of the crop."""
    return random.randint(0, room) if room >= 0 else round(room / 2)
