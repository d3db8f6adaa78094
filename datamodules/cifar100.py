"""CIFAR-100 and CIFAR-10 as published: Python pickles of 32 x 32 images."""

import hashlib
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.base import VisionDataModule
from datamodules.samples.cifar100 import FOLDERS, fine_names, write_cifar
from datamodules.samples.writing import is_sample

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}
"""What an honest pickle of these data sets refers to: how NumPy restores an array, and nothing else."""


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Refuses whatever is not needed to restore an array."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"{self.path} was refused: it is a pickle that wants to call {module}.{name}, and data needs "
                "no more than arrays, lists and strings. Such a file can run any code; get it from a source "
                "that you trust."
            )
        return super().find_class(module, name)


def read_pickle(path: Path, md5: str | None = None) -> dict[str, Any]:
    """Reads a pickled dict of arrays, lists and strings, running none of the code that a pickle may hold.

    Args:
        path: of the file.
        md5: expected checksum, hexadecimal; None: not checked.

    Returns:
        The dict; keys that are bytes become strings.

    Raises:
        pickle.UnpicklingError: when the file refers to anything but arrays; the message names it.
        ValueError: for a wrong checksum, or a file that is no such pickle.
    """
    content = path.read_bytes()
    if md5 is not None and (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(
            f"{path} is damaged: its md5 is {found}, not {md5}. Delete its folder and get it again."
        )
    try:
        loaded = _ArrayUnpickler(content, path).load()
    except pickle.UnpicklingError as error:
        if "was refused" in str(error):
            raise
        raise ValueError(f"{path} is no readable pickle: {error}") from error
    except Exception as error:  # damaged opcodes raise anything
        raise ValueError(f"{path} is no readable pickle: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the expected dict.")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}


class PixelDataset(Dataset[dict[str, Any]]):
    """Images that are held decoded.

    Args:
        images: uint8 (N, H, W, 3).
        labels: int64 (N,).
        indices: which of them belong to the data set; a sample's "index" is its position here.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64] | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = np.arange(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self.indices[index]
        return {"image": self.images[position], "label": int(self.labels[position]), "index": index}


class CIFAR100DataModule(VisionDataModule):
    """CIFAR-100, or CIFAR-10, in the files of the published archive.

    The 10,000 test images are also the validation images, and the best epoch is chosen on them, as in the
    papers that this project reproduces. That flatters the result a little; ``val_fraction`` holds training
    images out instead, and leaves the test images to ``test``.

    Args:
        name: which of the two.
        val_fraction: part of the training images that is kept for validation, the same ones for a seed; 0:
            validate on the test images.
        options: of ``VisionDataModule``.

    Raises:
        ValueError: for a ``val_fraction`` outside [0, 1), and in ``setup`` for a file with a wrong checksum.
        pickle.UnpicklingError: in ``setup``, for a pickle that holds more than data.
    """

    layout: ClassVar[str] = (
        "cifar-100-python/{train,test,meta}, or cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
    )

    def __init__(
        self, *, name: Literal["cifar100", "cifar10"] = "cifar100", val_fraction: float = 0.0, **options: Any
    ) -> None:
        super().__init__(**options)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
        self.name: Literal["cifar100", "cifar10"] = name
        self.val_fraction = val_fraction
        self._class_names: list[str] | None = None

    @property
    def folder(self) -> Path:
        """Of the data set in ``root``."""
        return self.root / FOLDERS[str(self.name)]

    @property
    def class_names(self) -> list[str]:
        """As ``meta`` has them; before the data is there, those of the sample, or else an error."""
        if self._class_names is None:
            meta = self._published().meta["filename"]
            if not (self.folder / meta).exists() and self.sample:
                return fine_names(self.sample_classes)
            self._class_names = list(self._read(meta)[self._published().meta["key"]])
        return self._class_names

    @property
    def num_classes(self) -> int:
        """As many as ``meta`` names; before the data is there, the sample's or the published number."""
        if self._class_names is None and not self.sample and not self.folder.exists():
            return 100 if self.name == "cifar100" else 10
        return len(self.class_names)

    def write_sample(self) -> None:
        """Writes the procedural sample in this data set's format."""
        write_cifar(self.root, self.name, self.sample_size, self.sample_classes)

    def fetch(self) -> None:
        """Downloads the published archive and unpacks it."""
        if self.folder.exists():
            return
        from torchvision.datasets.utils import (
            download_and_extract_archive,
        )

        published = self._published()
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.root) as temporary:
            download_and_extract_archive(
                published.url, temporary, filename=published.filename, md5=published.tgz_md5
            )
            (Path(temporary) / published.base_folder).rename(self.folder)

    def setup(self, stage: str) -> None:
        """Reads the splits of ``stage`` ("fit", "validate", "test" or "predict") into memory."""
        self.require(self.folder)
        published = self._published()
        count = len(self.class_names)
        if (stage == "fit" or (stage == "validate" and self.val_fraction)) and "train" not in self.datasets:
            images, labels = self._split([name for name, _ in published.train_list], count)
            order = np.random.default_rng(self.run_seed).permutation(len(images))
            held_out = round(self.val_fraction * len(images))
            self.datasets["train"] = PixelDataset(images, labels, np.sort(order[held_out:]))
            self.datasets["val"] = PixelDataset(images, labels, np.sort(order[:held_out]))
        if "test" not in self.datasets:
            self.datasets["test"] = PixelDataset(
                *self._split([name for name, _ in published.test_list], count)
            )
        self.datasets["predict"] = self.datasets["test"]
        if not self.val_fraction:
            self.datasets["val"] = self.datasets["test"]

    def _split(self, files: list[str], num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images (N, 32, 32, 3) and labels (N,) of a split's files."""
        key = "fine_labels" if self.name == "cifar100" else "labels"
        batches = [self._read(file) for file in files]
        try:
            rows = np.concatenate([batch["data"] for batch in batches])
            labels = np.concatenate([np.asarray(batch[key], np.int64) for batch in batches])
        except KeyError as error:
            raise ValueError(
                f"{self.folder / files[0]} has no {error}: is name: {self.name} right?"
            ) from error
        if rows.shape != (len(labels), 3072) or rows.dtype != np.uint8:
            raise ValueError(
                f"{self.folder}: expected uint8 rows of 3072 for {len(labels)} labels, got {rows.shape}."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"{self.folder}: labels {labels.min()}..{labels.max()}, but {num_classes} class names."
            )
        return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels

    def _read(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        self.require(path)
        published = self._published()
        sums = {**dict(published.train_list), **dict(published.test_list)}
        sums[published.meta["filename"]] = published.meta["md5"]
        return read_pickle(path, None if is_sample(self.folder) else sums[file])

    def _published(self) -> Any:
        """The class of torchvision: names, addresses and checksums of the files."""
        from torchvision import datasets

        return datasets.CIFAR100 if self.name == "cifar100" else datasets.CIFAR10
