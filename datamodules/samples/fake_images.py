"""Real pictures and six distinct "generators" that leave different traces on the same pictures.

Every picture, real or generated, is written in the same way: same size, same uncompressed PNG, same time
stamp. So the files' metadata say nothing about the label; only the pixels do.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import convolve, gaussian_filter

from datamodules.reading import read_image
from datamodules.samples.drawing import draw_picture
from datamodules.samples.writing import ensure_sample

Floats = NDArray[np.float64]
Generator = Callable[[Floats, np.random.Generator], Floats]


def _blur(image: Floats, sigma: float) -> Floats:
    return gaussian_filter(image, (sigma, sigma, 0))


def _halved(image: Floats) -> Floats:
    """2 x 2 average pooling."""
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))


def nearest(image: Floats, rng: np.random.Generator) -> Floats:
    """A GAN-like decoder: nearest-neighbour upsampling, smoothing, sharpening."""
    up = _blur(_halved(image).repeat(2, axis=0).repeat(2, axis=1), 0.7)
    return up + 0.9 * (up - _blur(up, 1.0))


def tconv(image: Floats, rng: np.random.Generator) -> Floats:
    """Checkerboards of a transposed convolution of stride 2 with uneven taps."""
    taps = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]) * 4
    taps *= np.array([[1.06, 0.97, 1.06], [0.97, 1.03, 0.97], [1.06, 0.97, 1.06]])
    spread = np.zeros_like(image)
    spread[::2, ::2] = _halved(image)
    return convolve(spread, taps[:, :, None], mode="nearest")


def vae(image: Floats, rng: np.random.Generator) -> Floats:
    """A bottleneck: of each 8 x 8 block's frequencies the lowest 4 x 4, quantised, then smoothed."""
    height, width, channels = image.shape
    blocks = image.reshape(height // 8, 8, width // 8, 8, channels)
    frequencies = dctn(blocks, axes=(1, 3), norm="ortho")
    kept = np.zeros_like(frequencies)
    kept[:, :4, :, :4] = np.round(frequencies[:, :4, :, :4] * 24) / 24
    return _blur(idctn(kept, axes=(1, 3), norm="ortho").reshape(image.shape), 0.6)


def diff(image: Floats, rng: np.random.Generator) -> Floats:
    """What a diffusion sampler leaves: noise that was smoothed away, and a little that was not."""
    smooth = _blur(image + rng.normal(0, 0.08, image.shape), 1.0)
    return smooth + rng.normal(0, 0.012, image.shape)


def spec(image: Floats, rng: np.random.Generator) -> Floats:
    """Ripples in the spectrum above a radius of 0.3 cycles a pixel."""
    vertical, horizontal = (np.fft.fftfreq(length) for length in image.shape[:2])
    radius = np.hypot(vertical[:, None], horizontal[None, :])
    gain = np.where(radius > 0.3, 1 + 0.9 * np.cos(12 * np.pi * radius), 1.0)
    return np.fft.ifft2(np.fft.fft2(image, axes=(0, 1)) * gain[..., None], axes=(0, 1)).real


class VectorQuantizer:
    """`vq`: 2 x 2 patches from a learned codebook, half-way to their smoothed copy.

    Args:
        images: (count, height, width, 3) in [0, 1], to learn the codebook from.
        entries: of the codebook.
        seed: of its start.
    """

    def __init__(self, images: Floats, entries: int = 192, seed: int = 0) -> None:
        from scipy.cluster.vq import kmeans2

        patches = np.concatenate([_patches(image) for image in images])
        rng = np.random.default_rng(seed)
        patches = patches[rng.permutation(len(patches))[:20000]]
        self.codebook, _ = kmeans2(patches, min(entries, len(patches)), iter=8, minit="points", seed=rng)

    def __call__(self, image: Floats, rng: np.random.Generator) -> Floats:
        """The image in code words."""
        from scipy.cluster.vq import vq

        words, _ = vq(_patches(image), self.codebook)
        height, width, _ = image.shape
        blocks = self.codebook[words].reshape(height // 2, width // 2, 2, 2, 3)
        coded = blocks.transpose(0, 2, 1, 3, 4).reshape(image.shape)
        return (coded + _blur(coded, 0.8)) / 2


def _patches(image: Floats) -> Floats:
    """(height, width, 3) to (height width / 4, 12)."""
    height, width, _ = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 12)


GENERATORS: dict[str, Generator | type[VectorQuantizer]] = {
    "nearest": nearest,
    "tconv": tconv,
    "vae": vae,
    "diff": diff,
    "vq": VectorQuantizer,
    "spec": spec,
}
"""GAN-like upsampling, checkerboards, bottleneck, diffusion residue, codebook, spectral ripples."""


def drawn_pictures(count: int, size: int, seed: int) -> Floats:
    """Procedural pictures of textured shapes, (count, size, size, 3) in [0, 1]."""
    pictures = [
        draw_picture(number % 10, size, size, np.random.default_rng((seed, number)))
        for number in range(count)
    ]
    return np.stack(pictures) / 255.0


def photograph_crops(
    files: Sequence[Path], size: int, crops: int, seed: int, short_side: int | None = None
) -> Floats:
    """Random crops of photographs, (files x crops, size, size, 3) in [0, 1].

    The short side is scaled first (Lanczos), which also wipes the grid of the photographs' own JPEG. Flat
    crops are drawn again.

    Args:
        files: photographs.
        size: of a crop, pixels.
        crops: of each photograph.
        seed: of their places.
        short_side: pixels; None: 288 / 112 of `size`, at least the crop.
    """
    side = max(size, round(size * 288 / 112)) if short_side is None else short_side
    out = []
    for number, file in enumerate(files):
        rng = np.random.default_rng((seed, number))
        image = read_image(file)
        factor = side / min(image.size)
        wanted = (max(side, round(image.width * factor)), max(side, round(image.height * factor)))
        pixels = np.asarray(image.resize(wanted, Image.Resampling.LANCZOS), np.float64) / 255
        for _ in range(crops):
            for _attempt in range(10):
                top, left = (int(rng.integers(0, room - size + 1)) for room in pixels.shape[:2])
                crop = pixels[top : top + size, left : left + size]
                if crop.std() > 0.06:
                    break
            out.append(crop)
    return np.stack(out)


def write_fake_images(
    root: Path,
    layout: Literal["universal", "genimage"] = "genimage",
    size: int = 120,
    image_size: int = 64,
    generators: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Writes drawn pictures and what the generators make of them, unless they are there.

    Args:
        root: of the data set.
        layout: whose folders and names.
        size: training pictures of each generator, and as many generated ones; half as many to test.
        image_size: height and width, pixels; a multiple of 8.
        generators: which; None is all six.
        seed: the same seed gives the same pictures.

    Raises:
        MisconfigurationException: when something else is there.
    """
    names = list(GENERATORS) if generators is None else list(generators)
    settings = {
        "layout": layout,
        "size": size,
        "image_size": image_size,
        "generators": names,
        "seed": seed,
    }

    def write(folder: Path) -> None:
        splits = {
            "train": drawn_pictures(size, image_size, 2 * seed),
            "test": drawn_pictures(max(2, size // 2), image_size, 2 * seed + 1),
        }
        write_generators(folder, splits, layout, names, seed)

    ensure_sample(root, settings, write)


def write_generators(
    folder: Path,
    splits: dict[Literal["train", "test"], Floats] | dict[str, Floats],
    layout: Literal["universal", "genimage"],
    generators: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Writes pictures and what the generators make of them in a published layout.

    A generated picture has the number of the picture that it was made from.

    Args:
        folder: that gets the data set.
        splits: pictures (count, side, side, 3) in [0, 1] of `train` and `test`; side a multiple of 8.
        layout: whose folders and names.
        generators: which; None is all six.
        seed: of the generators' noise.

    Raises:
        ValueError: a generator is unknown, or a side no multiple of 8.
    """
    names = list(GENERATORS) if generators is None else list(generators)
    unknown = sorted(set(names) - set(GENERATORS))
    if unknown:
        raise ValueError(f"generators: {', '.join(unknown)} unknown; there are {', '.join(GENERATORS)}.")
    if any(side % 8 for pictures in splits.values() for side in pictures.shape[1:3]):
        raise ValueError("the sides of the pictures must be multiples of 8.")
    for name in names:
        made = GENERATORS[name]
        generate: Generator = made(splits["train"][:200]) if isinstance(made, type) else made
        for split, pictures in splits.items():
            real, fake = _folders(folder, layout, name, split)
            for number, picture in enumerate(pictures):
                rng = np.random.default_rng((seed, number, len(split)))
                _write(real / f"{number:05d}.png", picture)
                _write(fake / f"{number:05d}.png", generate(picture, rng))


def _folders(root: Path, layout: str, name: str, split: str) -> tuple[Path, Path]:
    if layout == "universal":
        return root / split / name / "0_real", root / split / name / "1_fake"
    folder = root / name / f"imagenet_{name}" / ("train" if split == "train" else "val")
    return folder / "nature", folder / "ai"


def _write(path: Path, picture: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG", compress_level=0)  # so the size of the file tells nothing
    os.utime(path, (0, 0))
