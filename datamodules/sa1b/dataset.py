"""Samples of SA-1B: a framed picture and some of its masks, decoded when asked for."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.features import FeatureStore
from datamodules.reading import CorruptSampleError, DataError, as_stored, list_images, read_image
from datamodules.sa1b.frame import STRIDE, framed, low_resolution
from datamodules.sa1b.pairs import FolderPairs, Notes, RawPair, TarPairs, parse_notes


class RawSample(NamedTuple):
    """A picture with its annotations; their masks are not decoded."""

    index: int  # type: ignore[assignment]
    key: str
    path: str
    picture: Image.Image
    notes: Notes
    embedding: Tensor | None = None


class Sa1bDataset(Dataset[RawSample]):
    """Pictures of SA-1B by place.

    Args:
        pairs: on disk.
        rows: which of them, in order.
    """

    def __init__(self, pairs: FolderPairs | TarPairs, rows: NDArray[np.int64]) -> None:
        self.pairs = pairs
        self.rows = rows
        self.store: FeatureStore | None = None
        """Embeddings of the first pictures, where there is a cache."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Samples of each file that holds several."""
        ends = np.searchsorted(self.rows, np.cumsum(self.pairs.lengths))
        return [int(count) for count in np.diff(ends, prepend=0) if count]

    def identity(self, count: int) -> list[str]:
        """Name and bytes of the first pictures."""
        rows = self.rows[:count].tolist()
        return [f"{self.pairs.keys[row]} {self.pairs.image_bytes(row)}" for row in rows]

    def __getitem__(self, index: int) -> RawSample:
        pair = self.pairs.read(int(self.rows[index]))
        notes = parse_notes(pair.notes, pair.notes_name)
        return RawSample(
            index, pair.key, pair.image_name, _picture(pair, notes), notes, self._embedding(index)
        )

    def picture(self, index: int) -> Image.Image:
        """A picture alone, RGB, as its masks were drawn."""
        pair = self.pairs.read(int(self.rows[index]))
        return _picture(pair, parse_notes(pair.notes, pair.notes_name))

    def _embedding(self, index: int) -> Tensor | None:
        store = self.store
        if store is None or index >= len(store) or index in store.dropped:
            return None
        row, view = np.array([index]), np.zeros(1, np.int64)
        return torch.from_numpy(store.read(row, view)[0])


def _picture(pair: RawPair, notes: Notes) -> Image.Image:
    """Upright, or as it is stored where the JSON's size says so.

    Raises:
        CorruptSampleError: it cannot be read, or has another size than the JSON says.
    """
    picture = read_image(pair.image, pair.image_name)
    size = notes.width, notes.height
    if picture.size == size:
        return picture
    if picture.size == size[::-1]:
        stored = as_stored(picture, _again(pair.image))
        if stored.size == size:
            return stored
    raise CorruptSampleError(
        f"{pair.image_name} is {picture.width} x {picture.height} pixels, but {pair.notes_name} says "
        f"{size[0]} x {size[1]}, so its masks do not fit"
    )


def _again(image: Any) -> Any:
    return io.BytesIO(image.getvalue()) if isinstance(image, io.BytesIO) else image


class PictureDataset(Dataset[dict[str, Any]]):
    """Pictures of a folder and below.

    Args:
        folder: of the pictures.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"predict_folder: there is no folder {folder}.")
        self.folder = folder
        self.listing = list_images(folder)
        self.names = self.listing.names
        if not self.names:
            raise FileNotFoundError(f"predict_folder: no images in {folder}{self.listing.left_out()}.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "id": self.names[index],
            "path": self.path(index),
            "picture": self.picture(index),
        }

    def path(self, index: int) -> str:
        """Of a picture's file."""
        return str(self.folder / self.names[index])

    def picture(self, index: int) -> Image.Image:
        """RGB, upright."""
        return read_image(self.path(index))


# what becomes of a sample


class TrainingFrame:
    """A sample with `count` of its masks as low-resolution targets.

    Masks are drawn without replacement, and with where there are fewer. One that vanishes at low resolution
    is drawn again; a picture of which nothing is left has no masks.

    Args:
        frame: side of the square that the network sees, pixels.
        count: of the masks.
    """

    def __init__(self, frame: int, count: int) -> None:
        self.frame = frame
        self.count = count

    def __call__(self, sample: RawSample) -> dict[str, Any]:
        """`image`, `size`, `orig_size`, `masks`, `index`, `id`, `path`, and `embedding` or None."""
        masks: list[NDArray[np.bool_]] = []
        for place in torch.randperm(len(sample.notes.annotations)).tolist():
            target = low_resolution(sample.notes.mask(place), self.frame)
            if target.any():
                masks.append(target)
            if len(masks) == self.count:
                break
        if masks:
            again = torch.randint(len(masks), (self.count - len(masks),)).tolist()
            masks += [masks[place] for place in again]
        side = self.frame // STRIDE
        stacked = np.stack(masks) if masks else np.zeros((0, side, side), np.bool_)
        return {
            **_common(sample, self.frame),
            "masks": torch.from_numpy(stacked),
            "embedding": sample.embedding,
        }


class EvaluationFrame:
    """A sample with masks in the picture's own resolution.

    Args:
        frame: side of the square that the network sees, pixels.
        most: masks of a picture: the first ones; None takes all.
    """

    def __init__(self, frame: int, most: int | None) -> None:
        self.frame = frame
        self.most = most

    def __call__(self, sample: RawSample) -> dict[str, Any]:
        """`image`, `size`, `orig_size`, `truth` (n, height, width), `picture`, `index`, `id` and `path`."""
        notes = sample.notes
        decoded = [notes.mask(place) for place in range(len(notes.annotations))[: self.most]]
        truth = [mask for mask in decoded if mask.any()]
        shape = (0, notes.height, notes.width)
        stacked = np.stack(truth) if truth else np.zeros(shape, np.bool_)
        return {**_common(sample, self.frame), "truth": torch.from_numpy(stacked), "picture": sample.picture}


class PredictionFrame:
    """A picture to predict on, with the prompts for it.

    Args:
        frame: side of the square that the network sees, pixels.
        prompts: by the picture's name; None: everything is asked for.
    """

    def __init__(self, frame: int, prompts: Mapping[str, list[dict[str, Any]]] | None = None) -> None:
        self.frame = frame
        self.prompts = prompts

    def __call__(self, sample: Any) -> dict[str, Any]:
        """`image`, `size`, `orig_size`, `picture`, `index`, `id`, `path`, and `prompts` if there are any."""
        if isinstance(sample, RawSample):
            sample = {**_common(sample, self.frame), "picture": sample.picture}
        else:
            sample = {**sample, **_seen(sample["picture"], self.frame, sample["path"])}
        if self.prompts is None:
            return sample
        given = self.prompts.get(sample["id"])
        if given is None:
            known = ", ".join(list(self.prompts)[:3]) or "nothing"
            raise DataError(f"prompts: there is none for the picture {sample['id']} (there are for {known}).")
        return {**sample, "prompts": given}


class TeacherFrame:
    """A picture as uint8 (4, frame, frame) for a teacher; the fourth channel is 255 where the picture is.

    The padding of SAM is zero behind the normalisation, so whoever normalises has to know it.
    """

    def __init__(self, frame: int) -> None:
        self.frame = frame

    def __call__(self, sample: RawSample) -> Tensor:
        """Of a sample."""
        image, size = framed(sample.picture, self.frame, sample.path)
        inside = torch.zeros(1, self.frame, self.frame, dtype=torch.uint8)
        inside[:, : int(size[0]), : int(size[1])] = 255
        return torch.cat([image, inside])

    def __repr__(self) -> str:
        return f"longer side {self.frame}, bilinear by Pillow, padded"


def _common(sample: RawSample, frame: int) -> dict[str, Any]:
    known = {"index": sample.index, "id": sample.key, "path": sample.path}
    return {**_seen(sample.picture, frame, sample.path), **known}


def _seen(picture: Image.Image, frame: int, path: str) -> dict[str, Any]:
    image, size = framed(picture, frame, path)
    return {"image": image, "size": size, "orig_size": torch.tensor([picture.height, picture.width])}
