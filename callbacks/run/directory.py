"""Where a run's files are, how they are written, and how a line is said above its progress bar."""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from callbacks.run.escaping import json_text, printable


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

        tqdm.write(printable(text))
        sys.stdout.flush()  # a job's log file is read while the job runs


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report` to `path` at once or not at all: an existing file survives a full disk."""
    with replaced_atomically(path) as unfinished:
        unfinished.write_text(json_text(report, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """A new file to write to; it becomes `path` if the block ends well, and is removed otherwise.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        synchronise(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(unfinished)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Make sure that a file, or a folder with all that is in it, is on the disk."""
    for inner in path.iterdir() if path.is_dir() and not path.is_symlink() else ():
        synchronise(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # not every disk can with folders
            raise
    finally:
        os.close(descriptor)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one of that name, if there is one.

    Whenever the process is killed, `folder` is the older or the newer one, whole: where the system can, both
    change places in one step. Elsewhere (some network disks) there is a moment without `folder`, in which
    both lie beside it.
    """
    synchronise(new)
    if not folder.exists():
        new.rename(folder)
    elif _exchanged(new, folder):
        shutil.rmtree(new)
    else:
        older = folder.with_name(f".{folder.name}-{os.getpid()}.old")
        folder.rename(older)
        new.rename(folder)
        shutil.rmtree(older)
    synchronise_entry(folder)


def synchronise_entry(path: Path) -> None:
    """Make sure that the disk knows under which name `path` lies."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _exchanged(first: Path, second: Path) -> bool:
    """Let two folders change places at once, by Linux's `renameat2`; False where that is not possible."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


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
