"""The files of a feature cache: each there as a whole or not at all, and checked by a digest."""

import contextlib
import json
import os
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray

from datamodules.reading import DataError

STALE_SECONDS = 3600
"""Age of an unfinished file that nobody is writing any more: a shard takes seconds."""

_HEADER = {
    "encoder": str,
    "transform": str,
    "files": str,
    "shape": list,
    "dtype": str,
    "rows": int,
    "views": int,
    "shard_rows": int,
    "dropped": list,
}


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"shard_{number:05d}.npy"


class Shard:
    """A file of features, and beside it what it holds and a digest of its bytes.

    Args:
        path: of the file.
        rows: of the data set that it holds.
        views: of each.
    """

    def __init__(self, path: Path, rows: range, views: int) -> None:
        self.path, self.rows, self.views = path, rows, views

    def is_whole(self) -> bool:
        """Whether it is there, holds these rows and has not changed since it was written."""
        return self.held() == self.rows

    def held(self) -> range | None:
        """The rows that are there; None if they are fewer views, or have changed since they were written."""
        note = self._note()
        summed = None if note is None else _summed(self.path, note["held"], note["dropped"])
        if note is None or summed is None or note["digest"] != summed:
            return None
        start, stop, views = note["held"]
        return range(start, stop) if views == self.views else None

    def dropped(self) -> list[int]:
        """The rows that could not be read.

        Raises:
            DataError: what another rank wrote is not there.
        """
        note = self._note()
        if note is None:
            raise DataError(
                f"cache: {self.path} of another process is not there: the folder must be on a disk that all "
                "nodes share."
            )
        return list(note["dropped"])

    def write(self, features: NDArray[Any], dropped: list[int]) -> None:
        """Put the file there at once; first what is beside it."""
        unfinished = _unfinished(self.path)
        with open(unfinished, "wb") as file:
            np.save(file, features)
        held = [self.rows.start, self.rows.stop, self.views]
        note = {"held": held, "dropped": dropped, "digest": _summed(unfinished, held, dropped)}
        replace(self.path.with_suffix(".json"), json.dumps(note).encode())
        os.replace(unfinished, self.path)

    def _note(self) -> dict[str, Any] | None:
        try:
            note = json.loads(self.path.with_suffix(".json").read_bytes())
        except (OSError, ValueError):
            return None
        return note if isinstance(note, dict) and {"held", "dropped", "digest"} <= note.keys() else None


def read_header(folder: Path) -> dict[str, Any] | None:
    """The header, None where there is none that can be read."""
    try:
        header = json.loads((folder / "header.json").read_bytes())
    except (OSError, ValueError):
        return None
    fits = isinstance(header, dict) and all(isinstance(header.get(name), of) for name, of in _HEADER.items())
    return header if fits and header["shard_rows"] > 0 else None


def check_header(folder: Path, header: dict[str, Any], expected: dict[str, Any]) -> None:
    """Whether a header says what is expected.

    Raises:
        MisconfigurationException: it says something else; names the entry and both values.
    """
    for name, value in expected.items():
        if header.get(name) != value:
            raise MisconfigurationException(
                f"The cached features in {folder} have {name} {header.get(name)!r}, and {value!r} is "
                "asked for. Delete that folder, or set `cache` to another one."
            )


def replace(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    unfinished = _unfinished(path)
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}-{os.getpid()}")


def remove_stale(folder: Path) -> None:
    """What killed runs have left unfinished."""
    for path in folder.glob(".*-*"):
        with contextlib.suppress(FileNotFoundError):  # another run was faster
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _summed(path: Path, held: Any, dropped: Any) -> str | None:
    """Digest of a file and of what is noted of it; None where it cannot be read."""
    summed = blake2b(json.dumps([held, dropped]).encode(), digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                summed.update(block)
    except OSError:
        return None
    return summed.hexdigest()


def digest(*texts: str) -> str:
    """Twelve characters that stand for some texts."""
    return blake2b("\n".join(texts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
