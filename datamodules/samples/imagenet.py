"""The procedural sample as folders of JPEG files: ImageNet's layout, any image folder's, or pictures to
predict on.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.samples.drawing import class_name, draw_picture
from datamodules.samples.writing import ensure_sample


def write_image_folders(
    root: Path,
    size: int = 2000,
    num_classes: int = 10,
    wnids: bool = False,
    image_size: int = 96,
    seed: int = 0,
) -> None:
    """Writes ``<root>/{train,val}/<class>/*.JPEG``, unless it is there.

    Args:
        root: folder that gets ``train`` and ``val``.
        size: number of training images; a quarter as many are for validation.
        num_classes: the classes are balanced.
        wnids: name the class folders as ImageNet does, n90000000 and on; otherwise by what they show.
        image_size: length of the images' shorter side, pixels; the longer one is up to half as long again.
        seed: the same seed gives the same pictures.

    Raises:
        MisconfigurationException: when something else is there.
    """
    settings = {
        "size": size,
        "num_classes": num_classes,
        "wnids": wnids,
        "image_size": image_size,
        "seed": seed,
    }

    def write(folder: Path) -> None:
        for part, (split, count) in enumerate((("train", size), ("val", size // 4))):
            rng = np.random.default_rng(2 * seed + part)
            for number in range(count):
                label = number % num_classes
                name = f"n{90_000_000 + label}" if wnids else class_name(label)
                path = folder / split / name / f"{name}_{number // num_classes}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                _save(path, label, image_size, rng)

    ensure_sample(root, settings, write)


def write_pictures(folder: Path, size: int = 12, image_size: int = 224, seed: int = 0) -> None:
    """Writes ``<folder>/picture_000.jpg`` and on, one class after the other, unless they are there.

    Raises:
        MisconfigurationException: when something else is there.
    """
    settings = {"size": size, "image_size": image_size, "seed": seed}

    def write(target: Path) -> None:
        rng = np.random.default_rng(seed)
        for number in range(size):
            _save(target / f"picture_{number:03d}.jpg", number % 10, image_size, rng)

    ensure_sample(folder, settings, write)


def _save(path: Path, label: int, image_size: int, rng: np.random.Generator) -> None:
    long = int(image_size * rng.uniform(1, 1.5))
    height, width = (image_size, long) if rng.random() < 0.7 else (long, image_size)
    Image.fromarray(draw_picture(label, height, width, rng)).save(path, "JPEG", quality=90)
