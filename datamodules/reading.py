"""What lies in folders, how images are read from disk, and what happens to those that cannot be read.

All readers follow the rules of this file: which files are images, which are left out, and how their pixels
become 8-bit RGB.
"""

import glob
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
"""What to do with a sample that cannot be read: stop the run, or take the next readable one in its place."""

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
"""Endings of image files, in any case: torchvision's, and what else is found on the web."""

_LEFT_BY_SYSTEMS = frozenset(("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"))

_ORIENTATION, _PHOTOMETRIC, _BITS = 0x0112, 0x0106, 0x0102
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by the orientation in its EXIF."""
_BACK = {
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
}
"""What undoes a turn, where that is not the turn itself."""


class _OneSentence(Exception):
    """An error whose message stays one sentence when it comes from a worker process.

    torch makes a worker's exception anew from its whole traceback as text; the message is what ends it.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught "):
            message = message.rpartition(f".{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class CorruptSampleError(_OneSentence, RuntimeError):
    """A file that cannot be read; the message names it and the reason."""


class DataError(_OneSentence, MisconfigurationException, ValueError):
    """Data that is not as its layout says; the message names the folder or file and what was expected."""


# folders


class Listing(NamedTuple):
    """The images, or the folders, of a folder.

    Args:
        names: relative to the folder, sorted.
        hidden: hidden files and folders that were left out.
        other: files that were left out as they are none of what is listed.
    """

    names: list[str]
    hidden: int = 0
    other: int = 0

    def left_out(self) -> str:
        """`` (left out: 3 hidden, 1 other)``, or nothing."""
        counts = ((self.hidden, "hidden"), (self.other, "other"))
        said = ", ".join(f"{count} {kind}" for count, kind in counts if count)
        return f" (left out: {said})" if said else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the data, such as `.name`, `._name` and `__MACOSX`."""
    return name.startswith(".") or name in _LEFT_BY_SYSTEMS


def is_image(name: str) -> bool:
    """Whether a file of this name is an image, by its ending."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_images(folder: Path) -> Listing:
    """Lists the image files in and below a folder, see `list_files`."""
    return list_files(folder, is_image)


def list_files(folder: Path, wanted: Callable[[str], bool]) -> Listing:
    """Lists the files in and below a folder whose names are wanted.

    Links to files and folders are followed. A folder is listed once, whatever leads to it, and links to this
    folder or to one above it are left out, so loops end.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: a folder cannot be listed.
    """
    names, hidden, other = [], 0, 0
    seen = _and_above(folder)
    folders, links = deque([""]), deque[str]()
    while folders or links:
        prefix = folders.popleft() if folders else links.popleft()
        if prefix:
            identity = _identity(folder / prefix)
            if identity in seen:
                continue
            seen.add(identity)
        for entry in _entries(folder / prefix):
            if is_hidden(entry.name):
                hidden += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
            elif wanted(entry.name) and _is_file(entry):
                names.append(prefix + entry.name)
            else:
                other += 1
    return Listing(sorted(names), hidden, other)


def list_folders(folder: Path) -> Listing:
    """Lists the folders in a folder; a link to it or to a folder above it is none.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: the folder cannot be listed.
    """
    above = _and_above(folder)
    names, hidden, other = [], 0, 0
    for entry in _entries(folder):
        if is_hidden(entry.name):
            hidden += 1
        elif _is_folder(entry) and not (entry.is_symlink() and _identity(Path(entry.path)) in above):
            names.append(entry.name)
        else:
            other += 1
    return Listing(names, hidden, other)


def list_glob(pattern: str, wanted: Callable[[str], bool] = is_image) -> Listing:
    """Lists the files that a glob names; ``**`` follows links as `list_files` does, so it ends."""
    parts = Path(pattern).parts
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    folder, rest = Path(*parts[:fixed]), parts[fixed:]
    if "**" in rest:
        if not folder.is_dir():
            return Listing([])
        below = list_files(folder, wanted)
        names = [name for name in below.names if _matches(Path(name).parts, rest)]
        return below._replace(names=[str(folder / name) for name in names])
    paths = [path for path in glob.glob(pattern) if os.path.isfile(path)]
    seen = [path for path in paths if not any(map(is_hidden, Path(path).parts[fixed:]))]
    files = sorted(path for path in seen if wanted(os.path.basename(path)))
    return Listing(files, len(paths) - len(seen), len(seen) - len(files))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob; ``**`` stands for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        if not rest:
            return bool(parts)  # a folder is no file
        return any(_matches(parts[skipped:], rest) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no folder {folder}.") from None
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed: {error.strerror}.") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _and_above(folder: Path) -> set[tuple[int, int]]:
    if not folder.is_dir():
        return set()
    real = folder.resolve()
    return {_identity(place) for place in (real, *real.parents)}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """No pipe or device. A link that leads nowhere counts, so that reading it names it."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


# images


def read_image(path: Path | str | BinaryIO, name: str | None = None) -> Image.Image:
    """Decodes an image file into RGB, 8 bits a channel, upright.

    An orientation in the EXIF is followed. Of 16 bits the upper eight count; floats must be in [0, 1].
    Transparency is dropped, and of several frames the first is taken.

    Args:
        path: of the file, or the open file.
        name: what messages call it; None: `path`.

    Raises:
        CorruptSampleError: whatever is wrong with the file; the message holds path and reason.
    """
    try:
        with Image.open(path) as image:
            image.load()  # which turns a TIFF, and only that
            turn = _TURNS.get(_orientation(image))
            picture = _eight_bits(image)
            return picture if turn is None else picture.transpose(turn)
    except _UnknownRange as error:
        raise CorruptSampleError(f"cannot read the image {name or path} ({error})") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        said = re.sub(r" <_io\.\w+ object at \w+>", "", str(error))  # no address in memory
        reason = " ".join(f"{type(error).__name__}: {said}".split())
        raise CorruptSampleError(f"cannot read the image {name or path} ({reason})") from error


def as_stored(picture: Image.Image, path: Path | str | BinaryIO) -> Image.Image:
    """A picture that `read_image` gave, turned back to how its file stores it."""
    with Image.open(path) as image:
        turn = _TURNS.get(_orientation(image))
    return picture if turn is None else picture.transpose(_BACK.get(turn, turn))


class _UnknownRange(ValueError):
    """Pixels of which nothing says what is white."""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata say nothing about the pixels
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image as RGB; Pillow alone would clip what has more than 8 bits."""
    if image.mode.startswith("I;16"):
        bits = int(_tag(image, _BITS, 16))  # 12-bit TIFFs come as 0..4095
        return _grey(image, np.asarray(image) >> (min(bits, 16) - 8))
    if image.mode == "I":
        return _grey(image, _from_integers(np.asarray(image), known=image.format in ("PNG", "PPM")))
    if image.mode == "F":
        return _grey(image, _from_floats(np.asarray(image)))
    if image.mode == "La":  # premultiplied; Pillow converts it by way of LA only
        return image.convert("LA").convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image, values: NDArray[Any]) -> Image.Image:
    """RGB of values in 0..255; Pillow does not invert deep TIFFs whose zero is white."""
    white_is_zero = image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 1) == 0
    return Image.fromarray((255 - values if white_is_zero else values).astype(np.uint8)).convert("RGB")


def _from_integers(values: NDArray[Any], known: bool) -> NDArray[Any]:
    """0..255 of a 32-bit container; `known`: its range is 16 bits whatever is in it."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise _UnknownRange(
            f"its integers go from {low} to {high}: nothing says what is white; expected 0..255 or 0..65535"
        )
    return values >> 8 if known or high > 0xFF else values


def _from_floats(values: NDArray[Any]) -> NDArray[Any]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also when they are no numbers
        raise _UnknownRange(
            f"its floats go from {low:g} to {high:g}: nothing says what is white; expected 0 to 1"
        )
    return (values * 255).round()


def _tag(image: Image.Image, number: int, default: int) -> Any:
    """A tag of a TIFF, its first value; the default of any other file."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value


# what cannot be read


class SkipCounter:
    """Counts over the processes of a loader: each worker writes its own place in shared memory.

    Args:
        num_workers: of the loader.
        what: is counted, for the log.
    """

    def __init__(
        self, num_workers: int, what: str = "unreadable samples were replaced by others (on_error: skip)"
    ) -> None:
        self._what = what
        self._counts = torch.zeros(max(num_workers, 1), dtype=torch.int64).share_memory_()
        self._reported = 0

    def add(self) -> None:
        """Counts one, in whichever process."""
        worker = get_worker_info()
        self._counts[0 if worker is None else worker.id] += 1

    @property
    def total(self) -> int:
        """How many were counted so far."""
        return int(self._counts.sum())

    def report(self, name: str) -> None:
        """Logs how many were counted since the last report; says nothing when none were."""
        new, self._reported = self.total - self._reported, self.total
        if new:
            log.warning("%s: %d %s.", name, new, self._what)


_FEW = 200  # samples after which a share of unreadable ones means something


class SkippingDataset(Dataset[Any]):
    """Takes the next readable sample in place of one that is not: always the same one.

    Each file that is skipped is named once in the log of the process that met it.

    Args:
        dataset: raises ``CorruptSampleError`` for what it cannot read.
        counter: counts the samples that were replaced.
        most: share of what a process reads that may be unreadable; beyond it the run ends.

    Raises:
        DataError: more than that cannot be read.
    """

    def __init__(self, dataset: Dataset[Any], counter: SkipCounter, most: float = 1.0) -> None:
        self.dataset = dataset
        self.counter = counter
        self.most = most
        self._read = self._skipped = 0
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self._read += 1
        for candidate in chain(range(index, len(self)), range(index)):
            try:
                return self.dataset[candidate]
            except CorruptSampleError as error:
                if candidate == index:
                    self.counter.add()
                    self._skipped += 1
                    self._refuse_too_many(error)
                if candidate not in self._named:
                    self._named.add(candidate)
                    log.warning("skipped: %s", error)
        raise CorruptSampleError(f"not one of the {len(self)} samples can be read.")

    def _refuse_too_many(self, last: CorruptSampleError) -> None:
        if self._skipped > self.most * max(self._read, min(len(self), _FEW)):
            raise DataError(
                f"{self._skipped} of {self._read} samples cannot be read, more than max_skip_fraction: "
                f"{self.most:g}; the last one: {last}."
            )
