"""CIFAR-100 and CIFAR-10 as published: Python pickles of 32 x 32 images."""

import hashlib
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.reading import DataError, Listing
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
        DataError: for a wrong checksum, or a file that is no such pickle.
    """
    content = path.read_bytes()
    if md5 is not None and (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise DataError(
            f"{path} is damaged: its md5 is {found}, not {md5}. Delete its folder and get it again."
        )
    try:
        loaded = _ArrayUnpickler(content, path).load()
    except pickle.UnpicklingError as error:
        if "was refused" in str(error):
            raise
        raise DataError(f"{path} is no readable pickle: {_flat(error)}") from error
    except Exception as error:  # damaged opcodes raise anything
        raise DataError(f"{path} is no readable pickle: {type(error).__name__}: {_flat(error)}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a {type(loaded).__name__}, not the expected dict.")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())


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
        train_images: how many of the other training images are trained on, the same ones for a seed; null:
            all.
        options: of ``VisionDataModule``.

    Raises:
        ValueError: for a ``val_fraction`` outside [0, 1), or ``train_images`` below 1.
        DataError: in ``setup``, for a file with a wrong checksum or other content than published.
        pickle.UnpicklingError: in ``setup``, for a pickle that holds more than data.
    """

    layout: ClassVar[str] = (
        "cifar-100-python/{train,test,meta}, or cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
    )

    def __init__(
        self,
        *,
        name: Literal["cifar100", "cifar10"] = "cifar100",
        val_fraction: float = 0.0,
        train_images: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
        if train_images is not None and train_images < 1:
            raise ValueError(f"train_images must be at least 1, got {train_images}.")
        self.name: Literal["cifar100", "cifar10"] = name
        self.val_fraction = val_fraction
        self.train_images = train_images
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
            key = self._published().meta["key"]
            names = self._read(meta).get(key)
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise DataError(
                    f"{self.folder / meta} has no list of names {key}: is name: {self.name} right?"
                )
            self._class_names = list(names)
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
        """Downloads the published archive and unpacks it.

        Raises:
            DataError: it cannot be fetched, or is not what was published.
        """
        if self.folder.exists():
            return
        from torchvision.datasets.utils import (
            download_and_extract_archive,
        )

        published = self._published()
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.root) as temporary:
            try:
                download_and_extract_archive(
                    published.url, temporary, filename=published.filename, md5=published.tgz_md5
                )
            except Exception as error:  # of the network, the disk, the archive, or of torchvision
                raise DataError(f"download: {published.url} cannot be fetched ({_flat(error)}).") from error
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
            if self.val_fraction and not 0 < held_out < len(images):
                raise DataError(
                    f"val_fraction: {self.val_fraction} of {len(images)} training images in {self.folder} "
                    "leaves none to train or to validate on."
                )
            kept = order[held_out:]
            if self.train_images is not None:
                if self.train_images > len(kept):
                    raise DataError(
                        f"train_images: {self.train_images} are wanted, and {self.folder} has {len(kept)} "
                        "to train on."
                    )
                kept = kept[: self.train_images]
            self.datasets["train"] = PixelDataset(images, labels, np.sort(kept))
            self.datasets["val"] = PixelDataset(images, labels, np.sort(order[:held_out]))
            self._say("train", len(kept))
            self.announce_classes(labels[kept].tolist())
            if held_out:
                self._say("val", held_out)
        if "test" not in self.datasets:
            self.datasets["test"] = PixelDataset(
                *self._split([name for name, _ in published.test_list], count)
            )
            self._say("test", len(self.datasets["test"]))  # type: ignore[arg-type]
        self.datasets["predict"] = self.datasets["test"]
        if not self.val_fraction:
            self.datasets["val"] = self.datasets["test"]
            if stage == "fit":
                rank_zero_info(
                    f"{type(self).__name__}, val: the test images too; val_fraction would hold some out of "
                    "training."
                )

    def _say(self, split: Split, images: int) -> None:
        self.announce(split, f"{images} images of {self.num_classes} classes", self.folder, Listing([]))

    def _split(self, files: list[str], num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images (N, 32, 32, 3) and labels (N,) of a split's files.

        Raises:
            DataError: a file's content is not as published.
        """
        key = "fine_labels" if self.name == "cifar100" else "labels"
        rows, labels = zip(*(self._batch(file, key, num_classes) for file in files), strict=True)
        return np.concatenate(rows), np.concatenate(labels)

    def _batch(self, file: str, key: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images and labels of one file."""
        path, content = self.folder / file, self._read(file)
        missing = [name for name in ("data", key) if name not in content]
        if missing:
            raise DataError(f"{path} has no '{missing[0]}': is name: {self.name} right?")
        rows, given = content["data"], content[key]
        if not isinstance(given, list) or not all(type(label) is int for label in given):
            raise DataError(f"{path}: '{key}' must be a list of integers.")
        if not isinstance(rows, np.ndarray) or rows.shape != (len(given), 3072) or rows.dtype != np.uint8:
            found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise DataError(f"{path}: expected uint8 rows of 3072 for {len(given)} labels, got {found}.")
        if given and not 0 <= min(given) <= max(given) < num_classes:
            raise DataError(f"{path}: labels {min(given)}..{max(given)}, but {num_classes} class names.")
        images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.array(given, np.int64)

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
