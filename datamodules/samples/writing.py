"""Writing a sample so that it is there as a whole or not at all, whoever else writes it at the same time."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

MARKER = "sample.json"
"""File in a sample's folder that tells it from the real data, and holds what it was made with."""


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Gives a new folder that becomes ``target`` on success, and is removed otherwise.

    Where another process was faster, its folder stays and this one is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_sample(folder: Path) -> bool:
    """Whether ``folder`` is a sample, not the real data."""
    return (folder / MARKER).is_file()


def ensure_sample(target: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Writes a sample unless it is there.

    Args:
        target: folder of the sample.
        settings: what the sample is made with; kept in the folder.
        write: fills a folder.

    Raises:
        MisconfigurationException: when ``target`` holds something else, or a sample with other settings or
            a damaged marker.
    """
    if not target.is_dir() or not any(target.iterdir()):
        with atomic_folder(target) as folder:
            write(folder)
            (folder / MARKER).write_text(json.dumps(settings), encoding="utf-8")
    if not is_sample(target):
        raise MisconfigurationException(
            f"sample: true, but {target} holds data that is not a sample. Set sample: false to use it, "
            "or root to another folder."
        )
    try:
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise MisconfigurationException(
            f"{target / MARKER} is damaged ({error}). Delete {target}: the sample is written anew."
        ) from error
    if found != settings:
        raise MisconfigurationException(
            f"{target} holds a sample made with {found}, and {settings} is asked for. Delete that folder, "
            "or set root to another one."
        )
