"""An index of a gallery: its vectors, computed once and read from memory-mapped files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.features import FeatureCache, FeatureStore
from datamodules.loading import default_ranks
from datamodules.person_retrieval.datasets import GalleryDataset
from datamodules.person_retrieval.transforms import PersonTransforms
from datamodules.reading import DataError
from datamodules.shards import replace

CHUNK_ROWS = 8192
SHARD_BYTES = 8 * 2**20
"""Of vectors; small, so that ranks share the work on some thousand crops."""


class IndexedGallery:
    """The vectors of a gallery, never in memory as a whole.

    Args:
        store: of the vectors.
        dataset: the gallery.
    """

    def __init__(self, store: FeatureStore, dataset: GalleryDataset) -> None:
        self.store = store
        self.paths: Sequence[str] = [str(path) for path in dataset.paths]
        self.identities = dataset.identities

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Places (n,) in the gallery and vectors (n, width), some thousand at a time.

        Crops that could not be read, and were skipped, are left out.
        """
        dropped = np.asarray(self.store.dropped, np.int64)
        for begin in range(0, len(self.store), CHUNK_ROWS):
            rows = np.arange(begin, min(begin + CHUNK_ROWS, len(self.store)))
            rows = np.setdiff1d(rows, dropped)
            vectors = self.store.read(rows, np.zeros_like(rows))
            yield torch.from_numpy(rows), torch.from_numpy(vectors)


def open_index(
    folder: Path, cache: FeatureCache, dataset: GalleryDataset, transforms: PersonTransforms
) -> IndexedGallery:
    """The index of a gallery, made first where it is not there; a collective, every rank calls it.

    Other pictures in the same folder get vectors of their own; other weights or another size are refused.

    Args:
        folder: of the index.
        cache: what computes vectors, with the encoder.
        dataset: the gallery.
        transforms: what pictures go through.

    Raises:
        MisconfigurationException: the index was made by other weights or with another size.
        DataError: its note cannot be read.
    """
    height, width = transforms.image_size
    made = {"weights": cache.encoder.key, "transform": f"resized to {height} x {width}, bilinear"}
    note = folder / "index.json"
    if note.exists():
        _compare(note, made)
    elif default_ranks()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        replace(note, json.dumps(made, indent=1).encode())
    transform = transforms.evaluation()
    files = [str(path) for path in dataset.paths]
    return IndexedGallery(cache.open("gallery", Path(), files, transform, made["transform"]), dataset)


def _compare(note: Path, made: dict[str, str]) -> None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"index: {note} is no JSON: delete the folder, it is made again.") from error
    for name, value in made.items():
        if not isinstance(found, dict) or found.get(name) != value:
            other = found.get(name) if isinstance(found, dict) else found
            what = "by other weights" if name == "weights" else "with another transform"
            raise MisconfigurationException(
                f"index: {note.parent} was made {what} ({other}; this run has {value}): set index to another "
                "folder, or delete this one."
            )
