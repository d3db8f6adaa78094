"""The procedural sample in the format of CIFAR-100 and CIFAR-10."""

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.samples.drawing import SHAPES, class_name, class_parts, draw_picture
from datamodules.samples.writing import ensure_sample

FOLDERS = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}


def write_cifar(
    root: Path,
    name: Literal["cifar100", "cifar10"] = "cifar100",
    size: int = 2000,
    num_classes: int = 10,
    seed: int = 0,
) -> None:
    """Writes ``<root>/cifar-100-python`` or ``<root>/cifar-10-batches-py``, unless it is there.

    The files, their keys and the layout of the pixels are those of the published archives. Only classes that
    occur have names in ``meta``: ``num_classes`` fine ones, and as many coarse ones as they belong to.

    Args:
        root: folder that gets the data set's folder.
        name: which format.
        size: number of training images; a quarter as many are for the test.
        num_classes: the classes are balanced.
        seed: the same seed gives the same bytes.

    Raises:
        MisconfigurationException: when something else is there.
    """
    settings = {"name": name, "size": size, "num_classes": num_classes, "seed": seed}
    write = _write_cifar100 if name == "cifar100" else _write_cifar10
    ensure_sample(root / FOLDERS[name], settings, lambda folder: write(folder, size, num_classes, seed))


def fine_names(num_classes: int) -> list[str]:
    """Names of the sample's classes."""
    return [class_name(label) for label in range(num_classes)]


def coarse_name(label: int) -> str:
    """The sample's superclass of a class: one of 20, five textures of a shape."""
    shape, texture = class_parts(label)
    return f"{'fine' if texture >= 5 else 'bold'}_{SHAPES[shape]}s"


def _pictures(size: int, num_classes: int, seed: int) -> tuple[NDArray[np.uint8], list[int]]:
    """``size`` rows of 3072 = 1024 red, 1024 green, 1024 blue, each row-major; and their labels, in random
    order.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % num_classes).tolist()
    rows = np.empty((size, 3, 32, 32), np.uint8)
    for row, label in zip(rows, labels, strict=True):
        large = draw_picture(label, 64, 64, rng).astype(np.float64)
        row[:] = large.reshape(32, 2, 32, 2, 3).mean((1, 3)).round().transpose(2, 0, 1)
    return rows.reshape(size, 3072), labels


def _write_cifar100(folder: Path, size: int, num_classes: int, seed: int) -> None:
    coarse = sorted({coarse_name(label) for label in range(num_classes)})
    for part, (split, count) in enumerate((("train", size), ("test", size // 4))):
        data, labels = _pictures(count, num_classes, 2 * seed + part)
        batch = {
            "filenames": [f"{class_name(label)}_s_{i:06d}.png" for i, label in enumerate(labels)],
            "batch_label": "training batch 1 of 1" if split == "train" else "testing batch 1 of 1",
            "fine_labels": labels,
            "coarse_labels": [coarse.index(coarse_name(label)) for label in labels],
            "data": data,
        }
        _dump(folder / split, batch)
    _dump(folder / "meta", {"fine_label_names": fine_names(num_classes), "coarse_label_names": coarse})


def _write_cifar10(folder: Path, size: int, num_classes: int, seed: int) -> None:
    data, labels = _pictures(size, num_classes, 2 * seed)
    test = _pictures(size // 4, num_classes, 2 * seed + 1)
    for batch, rows in enumerate(np.array_split(np.arange(size), 5), start=1):
        part = data[rows], [labels[row] for row in rows]
        _dump(folder / f"data_batch_{batch}", _cifar10_batch(f"training batch {batch} of 5", *part))
    _dump(folder / "test_batch", _cifar10_batch("testing batch 1 of 1", *test))
    meta = {"num_cases_per_batch": size // 5, "label_names": fine_names(num_classes), "num_vis": 3072}
    _dump(folder / "batches.meta", meta)


def _cifar10_batch(batch_label: str, data: NDArray[np.uint8], labels: list[int]) -> dict[str, Any]:
    filenames = [f"{class_name(label)}_s_{i:06d}.png" for i, label in enumerate(labels)]
    return {"batch_label": batch_label, "labels": labels, "data": data, "filenames": filenames}


def _dump(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=2)
