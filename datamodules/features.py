"""Features of a frozen encoder, computed once and read from memory-mapped shards.

`<cache>/<encoder>/<transform>/<part>-<files>/` holds `shard_00000.npy`, ... (rows, views, width) float32 and
`header.json`. Encoder, transform and list of files are in the folder's names as digests and in the header in
full. A shard appears as a whole or not at all, so an interrupted run goes on where it was, and each rank
computes shards of its own.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from datamodules.loading import SeededDataset, default_ranks, hash_seed
from datamodules.reading import CorruptSampleError, OnError, read_image
from datamodules.workers import deaf_workers

log = logging.getLogger(__name__)

SHARD_ROWS = 16384


class Encoder(Protocol):
    """What computes features; ``lightning_modules.gendet.ImageEncoder`` is one."""

    width: int

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
        """(batch, width) of images (batch, 3, height, width) in [0, 1]."""
        ...


class FeatureStore:
    """The cached features of one list of files.

    Args:
        folder: of the shards, with a header.
        expected: entries that the header must have.

    Raises:
        MisconfigurationException: the header says something else; names the entry and both values.
    """

    def __init__(self, folder: Path, expected: dict[str, Any]) -> None:
        self.folder = folder
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        for name, value in expected.items():
            if header.get(name) != value:
                raise MisconfigurationException(
                    f"The cached features in {folder} have {name} {header.get(name)!r}, and {value!r} is "
                    "asked for. Delete that folder, or set `cache` to another one."
                )
        self.length = int(header["rows"])
        self.width = int(header["width"])
        self.views = int(header["views"])
        self.dropped: list[int] = header["dropped"]
        self._shard_rows = int(header["shard_rows"])
        self._shards: list[NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}  # another process maps the files itself

    def read(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features (n, width) of some rows, each in its view."""
        if self._shards is None:
            count = -(-self.length // self._shard_rows)
            self._shards = [np.load(shard_file(self.folder, place), mmap_mode="r") for place in range(count)]
        out = np.empty((len(rows), self.width), np.float32)
        places = rows // self._shard_rows
        for place in np.unique(places):
            chosen = places == place
            out[chosen] = self._shards[place][rows[chosen] % self._shard_rows, views[chosen]]
        return out


def shard_file(folder: Path, place: int) -> Path:
    """Where shard number ``place`` is."""
    return folder / f"shard_{place:05d}.npy"


class FeatureCache:
    """Computes and opens features.

    Args:
        folder: of all caches.
        encoder: see ``Encoder``.
        device: to compute on.
        batch_size: images at a time.
        num_workers: processes that read images.
        on_error: "skip" leaves unreadable images out, "raise" stops.
        shard_rows: images in a shard.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        device: Any = "cpu",
        batch_size: int = 64,
        num_workers: int = 0,
        on_error: OnError = "raise",
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_error: OnError = on_error
        self.shard_rows = shard_rows

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
        """The features of some files, computed first where they are not there yet. A collective: every rank
        calls it.

        Args:
            name: of the list of files, for people.
            root: that the names are relative to.
            files: names; with their sizes in bytes they identify the list.
            transform: an image to uint8 (3, height, width).
            described: all that the transform depends on.
            views: drawings of a random transform that are kept of each image.
            seed: of those; None: the transform is not random.

        Raises:
            CorruptSampleError: an image cannot be read, and ``on_error`` is "raise".
            ValueError: a feature is not finite; names the file.
        """
        sizes = [os.path.getsize(root / file) for file in files]
        listed = digest(*(f"{file} {size}" for file, size in zip(files, sizes, strict=True)))
        described = described if seed is None else f"{described}, views={views}, seed={seed}"
        key = self.encoder.key
        parts = [f"{_slug(self.encoder.model)}-{digest(key)}", digest(described), f"{_slug(name)}-{listed}"]
        folder = self.folder.joinpath(*parts)
        expected = {"encoder": key, "transform": described, "files": listed, "width": self.encoder.width}
        if not (folder / "header.json").is_file():
            images = _Pictures(root, files)
            seeded = SeededDataset(images, seed, _Transformed(transform))
            self._compute(folder, name, seeded, views, expected)
        return FeatureStore(folder, expected)

    def _compute(
        self, folder: Path, name: str, dataset: SeededDataset, views: int, expected: dict[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rank, world = default_ranks()
        starts = range(0, len(dataset), self.shard_rows)
        missing = [place for place in range(len(starts)) if not shard_file(folder, place).is_file()]
        if rank == 0:
            log.info("%s: features of %d images, computed once into %s", name, len(dataset), folder)
        self.encoder.to(self.device)
        for place in missing[rank::world]:
            start = starts[place]
            rows = range(start, min(start + self.shard_rows, len(dataset)))
            self._write_shard(shard_file(folder, place), dataset, rows, views)
        if world > 1:
            distributed.barrier()
        if rank == 0:
            dropped = [row for place in range(len(starts)) for row in _dropped(shard_file(folder, place))]
            if dropped:
                log.warning("%s: %d unreadable images are left out (on_error: skip).", name, len(dropped))
            header = {**expected, "rows": len(dataset), "views": views, "shard_rows": self.shard_rows}
            _replace(folder / "header.json", json.dumps({**header, "dropped": dropped}, indent=1).encode())
        if world > 1:
            distributed.barrier()

    def _write_shard(self, path: Path, dataset: SeededDataset, rows: range, views: int) -> None:
        keys = [(view, row) for row in rows for view in range(views)]
        loader: DataLoader[Any] = DataLoader(
            dataset,
            sampler=keys,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_kept,
            generator=torch.Generator(),
        )
        with deaf_workers(loader):
            batches = iter(loader)
        out = np.zeros((len(keys), self.encoder.width), np.float32)
        dropped: set[int] = set()
        for number, (places, images, faults) in enumerate(batches):
            if faults and self.on_error == "raise":
                raise CorruptSampleError(faults[0][1])
            first = number * self.batch_size
            for place, message in faults:
                dropped.add(keys[first + place][1])
                log.warning("skipped: %s", message)
            if len(places):
                features = self.encoder(images.to(self.device).float().div_(255)).float().cpu().numpy()
                out[first + places.numpy()] = features
        finite = np.isfinite(out).all(axis=1)
        if not finite.all():
            row = keys[int(np.argmin(finite))][1]
            raise ValueError(f"The features of {dataset.dataset.path(row)} are not finite.")  # type: ignore[attr-defined]
        _replace(path.with_suffix(".json"), json.dumps(sorted(dropped)).encode())
        with open(path.with_name(f".{path.name}-{os.getpid()}"), "wb") as file:
            np.save(file, out.reshape(len(rows), views, -1))
        os.replace(file.name, path)


def _dropped(shard: Path) -> list[int]:
    return json.loads(shard.with_suffix(".json").read_text())


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def digest(*texts: str) -> str:
    """Twelve characters that stand for some texts."""
    return blake2b("\n".join(texts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


class _Pictures(Dataset[Any]):
    """Image files; what cannot be read is its error."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root
        self.files = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[row]))

    def __getitem__(self, row: int) -> Any:
        try:
            return read_image(self.path(row))
        except CorruptSampleError as error:
            return str(error)


class _Transformed:
    """Applies the transform to what is an image."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, picture: Any) -> Any:
        return picture if isinstance(picture, str) else self.transform(picture)


def _kept(samples: list[Any]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    """Places and pixels of the images that could be read, and the errors of the others."""
    good = [place for place, sample in enumerate(samples) if not isinstance(sample, str)]
    faults = [(place, sample) for place, sample in enumerate(samples) if isinstance(sample, str)]
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

    def _read(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.float32]:
        parts = self.parts[index]
        out = np.empty((len(index), self.stores[0].width), np.float32)
        for part in np.unique(parts):
            mine, store = parts == part, self.stores[part]
            views = self._views(index[mine], epoch, store.views)
            out[mine] = store.read(self.rows[index[mine]], views)
        return out

    def _views(self, index: NDArray[np.int64], epoch: int, views: int) -> NDArray[np.int64]:
        """A view of each row: a pure function of seed, epoch and row."""
        if views == 1 or self.seed is None:
            return np.zeros(len(index), np.int64)
        return np.array([hash_seed(self.seed, epoch, int(row)) % views for row in index])

    def statistics(self, label: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (width,) of the first views of a label's features, in float64."""
        rows = np.flatnonzero(self.labels == label)
        total, squares = np.zeros(self.stores[0].width), np.zeros(self.stores[0].width)
        for start in range(0, len(rows), SHARD_ROWS):
            values = self._first(rows[start : start + SHARD_ROWS]).astype(np.float64)
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
        mean = total / len(rows)
        deviation = np.sqrt(np.maximum(squares / len(rows) - np.square(mean), 0.0))
        return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()

    def _first(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        kept, self.seed = self.seed, None
        try:
            return self._read(index, 0)
        finally:
            self.seed = kept
