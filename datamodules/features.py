"""Features of a frozen encoder, computed once and read from memory-mapped shards.

`<cache>/<encoder>/<transform>/<part>-<files>/` holds `shard_00000.npy`, ... (rows, views, *shape) of any
dtype, beside each a `.json` with its rows and a digest, and `header.json`. Encoder, transform and list of
files are in the folder's names as digests and in the header in full. A shard appears as a whole or not at
all, so an interrupted run goes on where it was, and each rank computes shards of its own. Whoever opens a
cache checks the digests, each rank those of its shards, and what is damaged is made again.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from datamodules.loading import SeededDataset, default_ranks, hash_seed
from datamodules.reading import CorruptSampleError, DataError, OnError, read_image
from datamodules.shards import Shard, check_header, digest, read_header, remove_stale, replace, shard_file

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
STATISTICS_ROWS = 16384


class Encoder(Protocol):
    """What computes features; `ImageEncoder` of the methods is one."""

    width: int
    """Of vectors; not asked for where the cache is given a shape."""

    @property
    def key(self) -> str:
        """All that the features depend on."""
        ...

    @property
    def model(self) -> str:
        """Name, for people."""
        ...

    def to(self, device: Any) -> Any:
        """Moves in place."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """(batch, *shape) of images (batch, 3, height, width) in [0, 1]."""
        ...


class FeatureStore:
    """The cached features of one list of files.

    Args:
        folder: of the shards, with a header.
        expected: entries that the header must have.

    Raises:
        MisconfigurationException: the header says something else; names the entry and both values.
        DataError: there is no readable header.
    """

    def __init__(self, folder: Path, expected: dict[str, Any]) -> None:
        self.folder = folder
        header = read_header(folder)
        if header is None:
            raise DataError(f"{folder / 'header.json'} is no header of cached features.")
        check_header(folder, header, expected)
        self.length = int(header["rows"])
        self.shape = tuple(header["shape"])
        self.dtype = np.dtype(header["dtype"])
        self.views = int(header["views"])
        self.dropped: list[int] = header["dropped"]
        self._shard_rows = int(header["shard_rows"])
        self._shards: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # another process maps the files itself

    @property
    def width(self) -> int:
        """Of vectors: the last entry of the shape."""
        return int(self.shape[-1])

    def read(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """Features (n, *shape) of some rows, each in its view."""
        out = np.empty((len(rows), *self.shape), self.dtype)
        numbers = rows // self._shard_rows
        for number in np.unique(numbers):
            chosen = numbers == number
            out[chosen] = self._shard(int(number))[rows[chosen] % self._shard_rows, views[chosen]]
        return out

    def _shard(self, number: int) -> NDArray[Any]:
        if number not in self._shards:
            path = shard_file(self.folder, number)
            try:
                self._shards[number] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise CorruptSampleError(f"cannot read the cached features {path} ({error})") from error
        return self._shards[number]


class FeatureCache:
    """Computes and opens features.

    Args:
        folder: of all caches.
        encoder: see `Encoder`.
        device: to compute on.
        batch_size: images at a time.
        num_workers: processes that read images.
        on_error: "skip" leaves unreadable images out, "raise" stops.
        shape: of one image's features, such as (256, 64, 64) of a map; None: (encoder.width,).
        dtype: that they are kept in.
        shard_bytes: most bytes of a shard, so far as one image has no more; what is held in memory while a
            shard is computed, and lost by an interruption.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        device: Any = "cpu",
        batch_size: int = 64,
        num_workers: int = 0,
        on_error: OnError = "raise",
        shape: tuple[int, ...] | None = None,
        dtype: Literal["float32", "float16", "uint8", "bool"] = "float32",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_error: OnError = on_error
        self.shape = (encoder.width,) if shape is None else tuple(shape)
        self.dtype = np.dtype(dtype)
        self.shard_bytes = shard_bytes

    def open(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        transform: Callable[[Any], Tensor],
        described: str,
        views: int = 1,
        seed: int | None = None,
    ) -> FeatureStore:
        """The features of some image files; see `open_dataset`.

        Args:
            name: of the list of files, for people.
            root: that the names are relative to.
            files: names; with their sizes in bytes they identify the list.
            transform: an image to uint8 (3, height, width).
            described: all that the transform depends on.
            views: drawings of a random transform that are kept of each image.
            seed: of those; None: the transform is not random.
        """
        pictures = _Pictures(root, files)
        listed = digest(*(f"{file} {_size(root / file)}" for file in files))
        return self.open_dataset(name, pictures, listed, transform, described, views, seed, pictures.path)

    def open_dataset(
        self,
        name: str,
        dataset: Dataset[Any],
        listed: str,
        transform: Callable[[Any], Tensor],
        described: str,
        views: int = 1,
        seed: int | None = None,
        named: Callable[[int], str] = "sample {}".format,
    ) -> FeatureStore:
        """The features of a data set, computed first where they are not there yet or damaged. A collective:
        every rank calls it.

        Args:
            name: of the data set, for people.
            dataset: of what `transform` takes; a `CorruptSampleError` is what cannot be read.
            listed: identifies the samples, such as a `digest` of their names and sizes.
            transform: a sample to uint8 (3, height, width).
            described: all that the transform depends on.
            views: drawings of a random transform that are kept of each sample.
            seed: of those; None: the transform is not random.
            named: what a sample is called in messages.

        Raises:
            CorruptSampleError: a sample cannot be read, and `on_error` is "raise".
            DataError: a feature is not finite; names the sample.
            MisconfigurationException: the cache is another encoder's or transform's, or the encoder gives
                another shape.
        """
        described = described if seed is None else f"{described}, views={views}, seed={seed}"
        if (self.shape, self.dtype) != ((self.shape[-1],), np.float32):
            described = f"{described}, {self.dtype} {self.shape}"
        key = self.encoder.key
        parts = [f"{_slug(self.encoder.model)}-{digest(key)}", digest(described), f"{_slug(name)}-{listed}"]
        folder = self.folder.joinpath(*parts)
        expected: dict[str, Any] = {"encoder": key, "transform": described, "files": listed}
        expected |= {"shape": list(self.shape), "dtype": self.dtype.name}
        header = read_header(folder)
        if header is not None:
            check_header(folder, header, expected)
        elif (folder / "header.json").exists() and default_ranks()[0] == 0:
            log.warning("%s is damaged, or of an older version: it is made again.", folder / "header.json")
        samples = SeededDataset(_Caught(dataset), seed, _Transformed(transform))
        length = len(samples)
        at_once = self._shard_rows(folder, length, views)
        shards = [
            Shard(shard_file(folder, number), range(start, min(start + at_once, length)), views)
            for number, start in enumerate(range(0, length, at_once))
        ]
        self._complete(name, samples, shards, named)
        if default_ranks()[0] == 0:
            entries = {**expected, "rows": length, "views": views, "shard_rows": at_once}
            entries["dropped"] = [row for shard in shards for row in shard.dropped()]
            if entries != header:
                replace(folder / "header.json", json.dumps(entries, indent=1).encode())
        if default_ranks()[1] > 1:
            distributed.barrier()
        store = FeatureStore(folder, expected)
        if store.dropped and default_ranks()[0] == 0:
            log.warning("%s: %d unreadable images are left out (on_error: skip).", name, len(store.dropped))
        return store

    def _shard_rows(self, folder: Path, length: int, views: int) -> int:
        """Rows of a shard: as the first one has them, if it is there."""
        first = Shard(shard_file(folder, 0), range(length), views).held()
        if first is not None:
            return len(first)
        return max(1, self.shard_bytes // (views * math.prod(self.shape) * self.dtype.itemsize))

    def _complete(
        self, name: str, samples: SeededDataset, shards: Sequence["Shard"], named: Callable[[int], str]
    ) -> None:
        """Make this rank's shards, as far as they are not there as a whole; then wait for the others."""
        rank, world = default_ranks()
        mine = [shard for shard in shards[rank::world] if not shard.is_whole()]
        if rank == 0 and shards:
            remove_stale(shards[0].path.parent)
        if mine:
            folder = mine[0].path.parent
            folder.mkdir(parents=True, exist_ok=True)
            rows = sum(len(shard.rows) for shard in mine)
            log.info("%s: features of %d images, computed once into %s", name, rows, folder)
            self.encoder.to(self.device)
        for shard in mine:
            if shard.path.exists():
                log.warning("%s is damaged, or of an older version: it is made again.", shard.path)
            shard.write(*self._features(samples, shard.rows, shard.views, named))
        if world > 1:
            distributed.barrier()

    def _features(
        self, samples: SeededDataset, rows: range, views: int, named: Callable[[int], str]
    ) -> tuple[NDArray[Any], list[int]]:
        """Features (rows, views, *shape), and the rows that cannot be read."""
        keys = [(view, row) for row in rows for view in range(views)]
        loader: DataLoader[Any] = DataLoader(
            samples,
            sampler=keys,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_kept,
            generator=torch.Generator(),
        )
        out = np.zeros((len(keys), *self.shape), self.dtype)
        dropped: set[int] = set()
        for number, (places, images, faults) in enumerate(loader):
            if faults and self.on_error == "raise":
                raise CorruptSampleError(faults[0][1])
            first = number * self.batch_size
            for place, message in faults:
                dropped.add(keys[first + place][1])
                log.warning("skipped: %s", message)
            if len(places):
                out[first + places.numpy()] = self._encoded(images)
        finite = np.isfinite(out.reshape(len(keys), -1)).all(axis=1)
        if not finite.all():
            row = keys[int(np.argmin(finite))][1]
            raise DataError(f"The features of {named(row)} are not finite, in {self.dtype}.")
        return out.reshape(len(rows), views, *self.shape), sorted(dropped)

    def _encoded(self, images: Tensor) -> NDArray[Any]:
        features = self.encoder(images.to(self.device).float().div_(255))
        if tuple(features.shape[1:]) != self.shape:
            raise MisconfigurationException(
                f"cache: {self.encoder.model} gives features of shape {tuple(features.shape[1:])}, and "
                f"{self.shape} is expected."
            )
        with np.errstate(over="ignore"):  # what does not fit is found with what is not finite
            return features.detach().float().cpu().numpy().astype(self.dtype)


def _size(path: Path) -> int:
    """In bytes; -1 of a file that is not there, which is found when it is read."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


class _Pictures(Dataset[Any]):
    """Image files."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root
        self.files = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[row]))

    def __getitem__(self, row: int) -> Any:
        return read_image(self.path(row))


class _Fault(str):
    """What is wrong with a sample."""


class _Caught(Dataset[Any]):
    """A data set in which what cannot be read is a `_Fault`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except CorruptSampleError as error:
            return _Fault(error)


class _Transformed:
    """Applies the transform to what could be read."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, sample: Any) -> Any:
        return sample if isinstance(sample, _Fault) else self.transform(sample)


def _kept(samples: list[Any]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    """Places and pixels of the images that could be read, and the errors of the others."""
    good = [place for place, sample in enumerate(samples) if not isinstance(sample, _Fault)]
    faults = [(place, str(sample)) for place, sample in enumerate(samples) if isinstance(sample, _Fault)]
    images = torch.stack([samples[place] for place in good]) if good else torch.empty(0)
    return torch.tensor(good, dtype=torch.int64), images, faults


class FeatureDataset(Dataset[Any]):
    """Rows of several stores, read as whole batches.

    Args:
        stores: features of one part each.
        labels: of the parts.
        generators: numbers of the parts' test sets.
        seed: draws the view of a row anew in each epoch; None: always the first view.
    """

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        labels: Sequence[int],
        generators: Sequence[int],
        seed: int | None = None,
    ) -> None:
        self.stores = list(stores)
        self.seed = seed
        rows = [np.delete(np.arange(len(store)), store.dropped) for store in stores]
        lengths = [len(kept) for kept in rows]
        self.rows = np.concatenate(rows)  # row in its store
        self.parts = np.repeat(np.arange(len(stores)), lengths)
        self.labels = np.repeat(np.asarray(labels, np.int64), lengths)
        self.generators = np.repeat(np.asarray(generators, np.int64), lengths)
        self.chosen = np.arange(len(self.rows))

    def of(self, labels: Sequence[int]) -> "FeatureDataset":
        """The rows with one of these labels; a row keeps its ``index``."""
        view = object.__new__(FeatureDataset)
        view.__dict__ = {**self.__dict__, "chosen": np.flatnonzero(np.isin(self.labels, list(labels)))}
        return view

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Any) -> Any:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Any]) -> dict[str, Tensor]:
        """A batch: ``features``, ``label``, ``generator``, ``index``."""
        epoch = 0 if isinstance(keys[0], int) else keys[0][0]
        places = np.array([key if isinstance(key, int) else key[1] for key in keys])
        index = self.chosen[places]
        return {
            "features": torch.from_numpy(self._read(index, epoch)),
            "label": torch.from_numpy(self.labels[index]),
            "generator": torch.from_numpy(self.generators[index]),
            "index": torch.from_numpy(index),
        }

    def _read(self, index: NDArray[np.int64], epoch: int) -> NDArray[Any]:
        parts = self.parts[index]
        values, places = [], []
        for part in np.unique(parts):
            mine, store = np.flatnonzero(parts == part), self.stores[part]
            values.append(store.read(self.rows[index[mine]], self._views(index[mine], epoch, store.views)))
            places.append(mine)
        out: NDArray[Any] = np.concatenate(values)
        out[np.concatenate(places)] = out.copy()
        return out

    def _views(self, index: NDArray[np.int64], epoch: int, views: int) -> NDArray[np.int64]:
        """A view of each row: a pure function of seed, epoch and row."""
        if views == 1 or self.seed is None:
            return np.zeros(len(index), np.int64)
        return np.array([hash_seed(self.seed, epoch, int(row)) % views for row in index])

    def statistics(self, label: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (width,) of the first views of a label's features, in float64.

        Raises:
            DataError: there is none.
        """
        rows = np.flatnonzero(self.labels == label)
        if not len(rows):
            raise DataError(f"cache: there are no features of label {label}: no image of it can be read.")
        total, squares = np.zeros(self.stores[0].width), np.zeros(self.stores[0].width)
        for start in range(0, len(rows), STATISTICS_ROWS):
            values = self._first(rows[start : start + STATISTICS_ROWS]).astype(np.float64)
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
        mean = total / len(rows)
        deviation = np.sqrt(np.maximum(squares / len(rows) - np.square(mean), 0.0))
        return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()

    def _first(self, index: NDArray[np.int64]) -> NDArray[Any]:
        kept, self.seed = self.seed, None
        try:
            return self._read(index, 0)
        finally:
            self.seed = kept
