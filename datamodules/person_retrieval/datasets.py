"""Training pairs, a gallery with each image once, and queries."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.person_retrieval.layouts import Person
from datamodules.reading import read_image


class PairDataset(Dataset[dict[str, Any]]):
    """One sample a caption, with its image.

    Args:
        root: that paths are relative to.
        persons: records.
        identities: number of each record's identity.
        ids: tokens (captions, length) of all captions, record by record.
    """

    def __init__(self, root: Path, persons: list[Person], identities: list[int], ids: Tensor) -> None:
        self.root, self.persons, self.ids = root, persons, ids
        self.rows = np.repeat(np.arange(len(persons)), [len(person.captions) for person in persons])
        self.identities = np.asarray(identities, np.int64)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = read_image(self.root / self.persons[self.rows[index]].path)
        identity = int(self.identities[index])
        return {"image": picture, "input_ids": self.ids[index], "identity": identity, "index": index}


class GalleryDataset(Dataset[dict[str, Any]]):
    """Each image once.

    Args:
        paths: of the images.
        identities: of the images; None where they are not known.
    """

    def __init__(self, paths: list[Path], identities: list[int] | None) -> None:
        self.paths, self.identities = paths, identities

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {"image": read_image(self.paths[index]), "index": index, "path": str(self.paths[index])}
        return sample if self.identities is None else {**sample, "identity": self.identities[index]}


class QueryDataset(Dataset[dict[str, Any]]):
    """Each caption once.

    Args:
        captions: sentences.
        ids: their tokens.
        identities: of the people described; None where they are not known.
    """

    def __init__(self, captions: list[str], ids: Tensor, identities: list[int] | None) -> None:
        self.captions, self.ids, self.identities = captions, ids, identities

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {"input_ids": self.ids[index], "index": index, "caption": self.captions[index]}
        return sample if self.identities is None else {**sample, "identity": self.identities[index]}
