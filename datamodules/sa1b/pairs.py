"""SA-1B on disk: pictures and their JSON files, extracted or in the tars as they are published."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray

from datamodules.coco import values
from datamodules.coco.segmentation import decode_segmentation
from datamodules.coco.values import shown
from datamodules.reading import CorruptSampleError, DataError, Listing, list_files
from datamodules.samples.writing import MARKER
from datamodules.streaming import TarShards

Source = Literal["auto", "folder", "tars"]

_IMAGES, _NOTES = ("jpg", "jpeg"), ("json",)


class CorruptMaskError(CorruptSampleError, ValueError):
    """A mask that does not fit its picture, or is none; the message names the file and the annotation."""


class RawPair(NamedTuple):
    """A picture and its annotations, not decoded."""

    key: str
    image: Path | BinaryIO
    image_name: str
    notes: bytes
    notes_name: str


class Pairs(Protocol):
    """Pictures with annotations, in a fixed order."""

    keys: Sequence[str]
    """`sa_223750`, the name without folder and ending."""
    lengths: list[int]
    """Pairs of each file that holds several, as they follow one another."""
    left_out: Listing
    """What was there and is not used."""

    def image_bytes(self, index: int) -> int:
        """Size of the picture's file."""
        ...

    def read(self, index: int) -> RawPair:
        """A pair."""
        ...


class FolderPairs:
    """Extracted pairs, flat or in folders such as `sa_000020`.

    Args:
        root: folder.

    Raises:
        DataError: no picture has a JSON beside it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        endings = {f".{suffix}" for suffix in _IMAGES + _NOTES}
        listing = list_files(root, lambda name: os.path.splitext(name)[1].lower() in endings)
        images: dict[str, str] = {}
        notes: dict[str, str] = {}
        for name in listing.names:
            if name == MARKER:
                continue
            stem, suffix = os.path.splitext(name)
            (notes if suffix.lower() == ".json" else images)[stem] = name
        both = sorted(images.keys() & notes.keys())
        self.incomplete = len(images.keys() ^ notes.keys())
        self.left_out = listing._replace(names=both)
        if not both:
            raise DataError(
                f"{root}: no picture (.jpg) has a JSON of its name beside it{listing.left_out()}."
            )
        self.keys = [os.path.basename(stem) for stem in both]
        self.lengths = [len(both)]
        self._images = [images[stem] for stem in both]
        self._notes = [notes[stem] for stem in both]

    def image_bytes(self, index: int) -> int:
        """Size of the picture's file; -1 if it is gone, which is found when it is read."""
        try:
            return os.path.getsize(self.root / self._images[index])
        except OSError:
            return -1

    def read(self, index: int) -> RawPair:
        """A pair.

        Raises:
            CorruptSampleError: the JSON is not there any more.
        """
        image, notes = self.root / self._images[index], self.root / self._notes[index]
        try:
            content = notes.read_bytes()
        except OSError as error:
            raise CorruptSampleError(f"cannot read {notes} ({error.strerror})") from error
        return RawPair(self.keys[index], image, str(image), content, str(notes))


class TarPairs:
    """The pairs of `sa_000000.tar`, ...; nothing is extracted.

    Args:
        files: the tars.

    Raises:
        DataError: a file is no whole tar, or none has a pair.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.shards = TarShards(files, {"image": _IMAGES, "notes": _NOTES})
        self.keys = [key.rpartition("/")[2] for key in self.shards.keys]
        self.lengths = self.shards.lengths
        self.incomplete = self.shards.incomplete
        self.left_out = Listing([])

    def image_bytes(self, index: int) -> int:
        """Size of the picture in its tar."""
        return self.shards.member_bytes(index, "image")

    def read(self, index: int) -> RawPair:
        """A pair.

        Raises:
            CorruptSampleError: the tar has become shorter or cannot be read.
        """
        sample = self.shards[index]
        name = f"{self.keys[index]} in {sample['path']}"
        return RawPair(
            self.keys[index], io.BytesIO(sample["image"]), f"{name} (jpg)", sample["notes"], f"{name} (json)"
        )


def open_pairs(root: Path, source: Source = "auto") -> FolderPairs | TarPairs:
    """The pairs in and below a folder.

    Args:
        root: folder.
        source: `tars`, `folder`, or whichever of them is there.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: both are there and `source` does not say which, or what is there is damaged or empty.
    """
    tars = [root / name for name in list_files(root, lambda name: name.lower().endswith(".tar")).names]
    if source == "folder":
        return FolderPairs(root)
    if source == "tars" or tars:
        if not tars:
            raise DataError(f"source: tars, but there is no .tar in {root}.")
        others = list_files(root, lambda name: name.lower().endswith(".jpg")).names
        if others and source == "auto":
            raise DataError(
                f"{root} has tars, such as {tars[0].name}, and pictures, such as {others[0]}: set source to "
                "tars or folder."
            )
        return TarPairs(tars)
    return FolderPairs(root)


def choose(keys: Sequence[str], ids: Path | None, fraction: float, root: Path) -> NDArray[np.int64]:
    """Rows that are used: those that a file names, and of them the first share of those in order.

    Args:
        keys: of all pairs.
        ids: text file with one `sa_<id>` a line; None takes all.
        fraction: in (0, 1].
        root: of the pairs, for messages.

    Raises:
        MisconfigurationException: the fraction is none.
        FileNotFoundError: there is no such file.
        DataError: the file names nothing that is there.
    """
    if not 0 < fraction <= 1:
        raise MisconfigurationException(f"fraction is in (0, 1], not {fraction}.")
    rows = np.arange(len(keys))
    if ids is not None:
        if not ids.is_file():
            raise FileNotFoundError(f"ids: there is no file {ids}.")
        wanted = {Path(line.strip()).stem for line in ids.read_text().splitlines() if line.strip()}
        rows = np.array([row for row, key in enumerate(keys) if key in wanted], np.int64)
        if not len(rows):
            some = ", ".join(sorted(wanted)[:3]) or "nothing"
            raise DataError(f"{ids} names {some}, and {root} has none of it (it has {keys[0]}, ...).")
    return rows[: max(1, round(fraction * len(rows)))]


class Notes(NamedTuple):
    """What the JSON of a picture says."""

    image_id: int | str
    height: int
    width: int
    annotations: list[dict[str, Any]]
    name: str

    def mask(self, place: int) -> NDArray[np.bool_]:
        """A mask (height, width), its run lengths checked.

        Raises:
            CorruptMaskError: they are of another size, do not add up, or are none.
        """
        try:
            return decode_segmentation(self.annotations[place].get("segmentation"), self.height, self.width)
        except (ValueError, RecursionError) as error:
            raise CorruptMaskError(f"{self.name}: annotations[{place}] {error}") from error


def parse_notes(content: bytes, name: str) -> Notes:
    """The JSON of a picture.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        CorruptSampleError: it is not JSON, or lacks a field; names file and field.
    """
    try:
        parsed = json.loads(content)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("image"), dict):
            raise ValueError("has no object 'image'")
        image, annotations = parsed["image"], parsed.get("annotations")
        if not isinstance(annotations, list) or not all(isinstance(entry, dict) for entry in annotations):
            raise ValueError(f"has the annotations {shown(annotations)}; a list of objects is needed")
        size = values.extent(image, "height"), values.extent(image, "width")
        if 0 in size:
            raise ValueError("has an image without height or width")
        return Notes(values.identifier(image, "image_id"), *size, annotations, name)
    except KeyError as error:
        raise CorruptSampleError(f"{name}: image has no field {error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptSampleError(f"{name} {error}") from error
