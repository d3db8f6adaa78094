"""Folders of images, one for each class; ImageNet is one of them."""

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch.utils.data import Dataset

from datamodules.base import Split, VisionDataModule
from datamodules.reading import DataError, Listing, list_folders, list_images, read_image
from datamodules.samples.drawing import class_name
from datamodules.samples.imagenet import write_image_folders
from datamodules.samples.writing import is_sample


class ImageFileDataset(Dataset[dict[str, Any]]):
    """Image files, read when asked for.

    The names are kept as one array, as reading a list of millions of strings in a worker process copies all
    of it.

    Args:
        folder: that the names are relative to.
        names: of the files.
        labels: of the files; None: samples have none.
        with_path: add "path" to the samples.
    """

    def __init__(
        self, folder: Path, names: list[str], labels: list[int] | None = None, with_path: bool = False
    ) -> None:
        self.folder = folder
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.with_path = with_path

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {"image": self.picture(index), "index": index}
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        if self.with_path:
            sample["path"] = self.path(index)
        return sample

    def path(self, index: int) -> str:
        """Of an image; a name that is not UTF-8 has surrogates in it, as everywhere in Python."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def picture(self, index: int) -> Image.Image:
        """An image alone.

        Raises:
            CorruptSampleError: it cannot be read.
        """
        return read_image(self.path(index))


class ImageFolderDataModule(VisionDataModule):
    """Any data set in the layout ``<root>/{train,val,test}/<class>/<image>``.

    Labels are the positions of the sorted names of the training folders; images in folders below a class
    belong to it. Without a test folder the validation images are tested, and the other way round, which is
    said.

    Args:
        train_dir: name of the training folder.
        val_dir: name of the validation folder.
        test_dir: name of the test folder.
        val_fraction: share of each class that is held out of the training images, by the seed, where there is
            no validation folder; then class folders may also lie in ``root`` itself.
        options: of ``VisionDataModule``.

    Raises:
        DataError: in ``setup``, for a class folder that training lacks, or a split without images.
    """

    layout: ClassVar[str] = (
        "train/<class>/*.jpg and val/<class>/*.jpg (or test/), any image format, also in folders below"
    )

    def __init__(
        self,
        *,
        train_dir: str = "train",
        val_dir: str = "val",
        test_dir: str = "test",
        val_fraction: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction: must be at least 0 and below 1, got {val_fraction}.")
        self.val_fraction = val_fraction
        self.train_dir = train_dir
        self.val_dir = val_dir
        self.test_dir = test_dir
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The sorted names of the training folders; of the evaluation folders where there is no training
        data.
        """
        if self._class_names is None:
            folders = [self.root / name for name in (self.train_dir, self.val_dir, self.test_dir)]
            existing = [folder for folder in (*folders, self._train_folder()) if folder.is_dir()]
            if not existing and self.sample:
                return self._sample_names()
            self.require(folders[0] if not existing else existing[0])
            self._class_names = list_folders(existing[0]).names
            self._check_classes(existing[0], self._class_names)
        return self._class_names

    def write_sample(self) -> None:
        """Writes the procedural sample as class folders of JPEG files."""
        write_image_folders(self.root, self.sample_size, self.sample_classes)

    def setup(self, stage: str) -> None:
        """Lists the files of the splits of ``stage`` ("fit", "validate", "test" or "predict").

        Raises:
            DataError: there are no validation images, and nothing says where they come from.
        """
        if stage == "fit" and not self._held_out_of("val"):
            self.datasets["train"] = self._listed("train", self._train_folder())
        if stage in ("fit", "validate"):
            self._evaluated("val", "val", stage)
        elif stage in ("test", "predict"):
            self._evaluated("test" if stage == "test" else "predict", "test", stage)

    def _evaluated(self, split: Split, kind: str, stage: str) -> None:
        """Put the images to evaluate on into ``datasets``: of a folder, or held out of training."""
        if self._held_out_of(kind):
            train, held_out = self._divided()
            assert held_out.labels is not None
            if stage == "fit":
                self.datasets["train"] = train
            self.datasets[split] = ImageFileDataset(
                held_out.folder,
                [os.fsdecode(n) for n in held_out.names],
                held_out.labels.tolist(),
                split == "predict",
            )
            return
        wanted, other = (self.val_dir, self.test_dir) if kind == "val" else (self.test_dir, self.val_dir)
        self.datasets[split] = self._listed(split, self._first_folder(kind, wanted, other))

    def _train_folder(self) -> Path:
        """Where the class folders of training are: ``root`` itself, if it holds none of the splits."""
        flat = not any((self.root / name).is_dir() for name in (self.train_dir, self.val_dir, self.test_dir))
        return self.root if flat and self.val_fraction and self.root.is_dir() else self.root / self.train_dir

    def _held_out_of(self, kind: str) -> bool:
        """Whether a split is part of the training images."""
        folders = (self.val_dir,) if kind == "val" else (self.test_dir, self.val_dir)
        return self.val_fraction > 0 and not any((self.root / name).is_dir() for name in folders)

    def _divided(self) -> tuple[ImageFileDataset, ImageFileDataset]:
        """The training images without and with those that are held out: a share of every class, by the seed.

        Raises:
            DataError: nothing is left on one side.
        """
        everything = self._listed("train", self._train_folder())
        labels = everything.labels
        assert labels is not None
        generator = np.random.default_rng(self.run_seed)
        chosen = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            places = generator.permutation(np.flatnonzero(labels == label))
            count = max(1, round(self.val_fraction * len(places))) if len(places) > 1 else 0
            chosen[places[:count]] = True
        if chosen.all() or not chosen.any():
            raise DataError(
                f"val_fraction: {self.val_fraction} of {len(labels)} images in {everything.folder} leaves "
                "none to train or to validate on."
            )
        rank_zero_info(
            f"{type(self).__name__}: {chosen.sum()} of them, {self.val_fraction:g} of each class, are held "
            f"out for evaluation (val_fraction, seed {self.run_seed}); {(~chosen).sum()} are trained on."
        )
        names = [os.fsdecode(name) for name in everything.names]
        parts = []
        for places in (np.flatnonzero(~chosen), np.flatnonzero(chosen)):
            kept = [names[place] for place in places]
            parts.append(ImageFileDataset(everything.folder, kept, labels[places].tolist()))
        return parts[0], parts[1]

    def _sample_names(self) -> list[str]:
        return sorted(class_name(label) for label in range(self.sample_classes))

    def _first_folder(self, split: str, wanted: str, other: str) -> Path:
        if not (self.root / wanted).is_dir() and (self.root / other).is_dir():
            remedy = ", or set val_fraction to hold some out of training" if split == "val" else ""
            rank_zero_info(
                f"{type(self).__name__}: {self.root} has no folder {wanted}, so the images of {other} are "
                f"the {split} data too. Give {wanted} images of its own{remedy}."
            )
            return self.root / other
        if split == "val" and not (self.root / wanted).is_dir() and (self.root / self.train_dir).is_dir():
            raise DataError(
                f"{self.root} has no folder {wanted} to validate on: set val_fraction, such as 0.2, to hold "
                f"images out of {self.train_dir}."
            )
        return self.root / wanted

    def _listed(self, split: Split, folder: Path) -> ImageFileDataset:
        self.require(folder)
        names, labels, empty = [], [], []
        labels_of = {name: label for label, name in enumerate(self.class_names)}
        classes = list_folders(folder)
        unknown = [name for name in classes.names if name not in labels_of]
        if unknown:
            raise DataError(
                f"{folder} has class folders that {self.root / self.train_dir} lacks: {_some(unknown)}."
            )
        _, hidden, other = classes
        for name in classes.names:
            listing = list_images(folder / name)
            if not listing.names:
                empty.append(name)
            names += [f"{name}/{file}" for file in listing.names]
            labels += [labels_of[name]] * len(listing.names)
            hidden, other = hidden + listing.hidden, other + listing.other
        if empty and split == "train":
            raise DataError(f"{folder} has class folders without an image: {_some(empty)}.")
        if not names:
            loose = list_images(folder).names
            hint = f" ({len(loose)} images lie in it unsorted; each class needs a folder)" if loose else ""
            raise DataError(f"{folder} has no images in class folders{hint}. Expected: {self.layout}.")
        listing = Listing(names, hidden, other)
        self.announce(split, f"{len(names)} images of {len(classes.names)} classes", folder, listing)
        self.announce_classes(labels)
        return ImageFileDataset(folder, names, labels, with_path=split == "predict")

    def _check_classes(self, folder: Path, names: list[str]) -> None:
        """Whether the class folders look right; any do here, as long as there are some."""
        if not names:
            raise DataError(f"{folder} has no class folders. Expected under root={self.root}: {self.layout}.")


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet-1K: ``<root>/{train,val}/n########/*.JPEG``, with the validation images sorted into class
    folders.

    The class id is the position of the sorted WordNet id, as everywhere.

    Args:
        options: of ``ImageFolderDataModule``.

    Raises:
        DataError: for folders that are no WordNet ids, or another number of them than 1000, except in a
            sample.
    """

    layout: ClassVar[str] = "train/n########/*.JPEG (1000 folders) and val/n########/*.JPEG"

    @property
    def num_classes(self) -> int:
        """1000, except in a sample."""
        if self._class_names is None and not self.sample and not self.root.is_dir():
            return 1000
        return len(self.class_names)

    def write_sample(self) -> None:
        """Writes the procedural sample with class folders that are named like ImageNet's."""
        write_image_folders(self.root, self.sample_size, self.sample_classes, wnids=True)

    def _sample_names(self) -> list[str]:
        return [f"n{90_000_000 + label}" for label in range(self.sample_classes)]

    def _check_classes(self, folder: Path, names: list[str]) -> None:
        super()._check_classes(folder, names)
        odd = [name for name in names if not re.fullmatch(r"n\d{8}", name)]
        if odd:
            raise DataError(
                f"{folder} has folders that are no WordNet ids (n and eight digits): {_some(odd)}. "
                "ImageFolderDataModule reads class folders of any name."
            )
        if len(names) != 1000 and not is_sample(self.root):
            raise DataError(
                f"{folder} has {len(names)} class folders, ImageNet-1K has 1000. "
                "ImageFolderDataModule reads any number of them."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
