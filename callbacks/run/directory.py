"""Where a run's files are, how they are written, and how a line is said above its progress bar."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run, `trainer.default_root_dir`; made on rank 0 when it is asked for.

    Raises:
        MisconfigurationException: `default_root_dir` is an address such as `s3://...`; reports are local
        files.
    """
    root = str(trainer.default_root_dir)
    if "://" in root:
        raise MisconfigurationException(
            f"trainer.default_root_dir is '{root}': reports need a local directory."
        )
    directory = Path(root)
    if trainer.is_global_zero:
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def announce(trainer: Trainer, text: str) -> None:
    """Print a line on rank 0, above whatever progress bar is live."""
    if trainer.is_global_zero:
        from tqdm import tqdm

        tqdm.write(text)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report` to `path` at once or not at all: an existing file survives a full disk."""
    with replaced_atomically(path) as unfinished:
        unfinished.write_text(
            json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
        )


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """A new file to write to; it becomes `path` if the block ends well, and is removed otherwise."""
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def checkpoint_directory(run: Path, dirpath: str | os.PathLike | None = None) -> Path:
    """Where a run's checkpoints are.

    Args:
        run: the run's directory.
        dirpath: what the user chose instead (`checkpoint.dirpath`), relative to the working directory.

    Raises:
        MisconfigurationException: `dirpath` is an address such as `s3://...`.
    """
    if dirpath is None:
        return run / "checkpoints"
    if "://" in str(dirpath):
        raise MisconfigurationException(
            f"checkpoint.dirpath is '{dirpath}': checkpoints need a local directory."
        )
    return Path(os.path.realpath(os.path.expanduser(dirpath)))
