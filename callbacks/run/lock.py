"""One training run at a time in a folder: the lock, and the tidying that it makes safe."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.run.checkpointing import checkpoints_of
from callbacks.run.directory import run_directory

NAME = ".lock"
_PARTIAL = re.compile(r"\..+\.ckpt\.\d+\.partial")
_PATIENCE = 2.0  # seconds: a run that was told to end may still be closing its files


class FolderLock:
    """An exclusive lock on a folder, held by this process and by none that it starts.

    It is a POSIX record lock on the file `.lock` in the folder: it ends with the process, however that ends,
    is not inherited by loader workers that outlive a killed run, and works on network file systems.

    Args:
        folder: made if it is not there.

    Raises:
        MisconfigurationException: another process holds the lock (named in the message), or the folder cannot
            be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire(time.monotonic() + _PATIENCE)
        except OSError as error:
            raise MisconfigurationException(f"The folder '{folder}' cannot be written: {error}.") from error

    def _acquire(self, deadline: float) -> int | None:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(file, 200).decode(errors="replace").strip()
                os.close(file)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    rank_zero_warn(
                        f"'{self.path.parent}' is on a file system without locks ({error}): nothing keeps a "
                        "second run out of it."
                    )
                    return None
                if time.monotonic() > deadline:
                    raise MisconfigurationException(
                        f"'{self.path.parent}' is in use by another run ({holder or 'unknown process'}): "
                        "wait for its end, or choose another trainer.default_root_dir."
                    ) from error
                time.sleep(0.1)
                continue
            if self._is_in_place(file):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
            os.close(file)  # its holder removed it between our opening and locking

    def _is_in_place(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and give the lock back."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


class RunLock(Callback):
    """Refuses a `fit` in a folder where another one is running, and removes what a killed one left half
    written.

    Two runs in one folder would overwrite each other's checkpoints. Rank 0 locks the run's directory, and the
    folder of the checkpoints where `checkpoint.dirpath` puts it elsewhere. Commands that only read
    checkpoints are free to run beside a `fit`.

    A start that fails before the first step leaves nothing in a folder that was not there before.

    Args:
        overwrite: remove the run that is there, once it is certain that nobody works on it.
    """

    def __init__(self, overwrite: bool = False) -> None:
        self.overwrite = overwrite
        self._since = time.time()
        self._locks: list[FolderLock] = []
        self._new: tuple[Path, Path] | None = None  # the run's folders, while nothing was trained in them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lock and tidy, in `fit`.

        Raises:
            MisconfigurationException: on every rank, if rank 0 could not get the lock.
        """
        if stage != "fit":
            return
        refusal = None
        if trainer.is_global_zero:
            try:
                self._lock(trainer)
            except MisconfigurationException as error:
                self._release()
                refusal = str(error)
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise MisconfigurationException(refusal)

    def _lock(self, trainer: Trainer) -> None:
        run, checkpoints = run_directory(trainer), checkpoints_of(trainer)
        older = (path for path in run.rglob("*") if path.is_file() and path.stat().st_mtime < self._since)
        is_new = next(older, None) is None
        folders = [run]
        if run.resolve() not in (checkpoints.resolve(), *checkpoints.resolve().parents):
            folders.append(checkpoints)
        for folder in folders:
            self._locks.append(FolderLock(folder))
        self._new = (run, checkpoints) if is_new else None
        if self.overwrite:
            remove_run(run, checkpoints, before=self._since)  # this run's log is open already
        for file in checkpoints.glob(".*.partial"):
            if _PARTIAL.fullmatch(file.name):
                file.unlink(missing_ok=True)
                rank_zero_info(f"'{file}' is removed: a killed run left it unfinished.")

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        """From here on the folder holds a run."""
        self._new = None

    def _release(self) -> None:
        while self._locks:
            self._locks.pop().release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the next run in."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the next run in, as `teardown` is not called."""
        self._release()
        new, self._new = self._new, None
        if new is not None and not any(new[1].glob("*.ckpt")):
            for logger in trainer.loggers:
                logger.finalize("failed")
            remove_run(*new)
            for folder in reversed(new):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # where it is empty


def remove_run(run: Path, checkpoints: Path, before: float = float("inf")) -> None:
    """Remove what a run has written: checkpoints, logs, configurations, results; other files stay.

    Args:
        run: its folder.
        checkpoints: the folder of its checkpoints.
        before: newer files of the log stay; seconds since the epoch.
    """
    for file in (*checkpoints.glob("*.ckpt"), *run.glob("config_*.yaml"), *run.glob("results*.json")):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
    for path in (*sorted((run / "logs").rglob("*"), reverse=True), run / "logs"):
        with contextlib.suppress(OSError):  # a folder that is not empty
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.lstat().st_mtime < before:
                path.unlink()
