"""Checkpoints that survive: written atomically, kept by default, found again by `--ckpt_path auto`."""

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.run.directory import checkpoint_directory
from lightning_modules.parts.weights import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, makes sure that it is on the disk, then puts it in place.

    Whatever happens on the way (power cut, SIGKILL, full disk), the file of that name is either the old one
    or the new one, whole.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, or leave what is there untouched.

        Raises:
            OSError: the disk is full or the folder not writable; names the path and says what is left.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            kept = (
                f"the previous '{target.name}' is intact"
                if target.exists()
                else "no file of that name was there"
            )
            raise OSError(f"The checkpoint '{target}' could not be written ({error}); {kept}.") from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Contents of a checkpoint, always without running code from it, see `read_checkpoint`."""
        return read_checkpoint(Path(path))


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in `<run>/checkpoints`, with a `last.ckpt` that is always there.

    Args:
        dirpath: None is `checkpoints` in the run's directory.
        filename: of the kept checkpoints.
        monitor: metric that decides which is best (`val/top1`); None keeps the latest.
        mode: whether more (`max`) or less (`min`) of the metric is better.
        save_last: also write `last.ckpt`.
        save_top_k: how many of the best to keep; -1 all.
        every_n_train_steps: write in the middle of an epoch too, every so many optimiser steps.
        train_time_interval: or after so much time.
        every_n_epochs: write every so many epochs.
        save_on_train_epoch_end: at the end of the training epoch instead of after validation.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        save_last: bool = True,
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_last=save_last,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder."""
        self.dirpath = str(checkpoints_of(trainer))
        super().setup(trainer, pl_module, stage)

        self._validated = False  # since the last write; validation may leave a threshold or a score behind

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was saved before knows nothing of this validation."""
        super().on_validation_start(trainer, pl_module)
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save every epoch, also those that no validation follows."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._every_n_train_steps < 1 and self._train_time_interval is None and self._every_n_epochs <= 1:
            self._bring_last_up_to_date(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring `last.ckpt` up to the end of the run, whatever the intervals are."""
        super().on_train_end(trainer, pl_module)
        self._bring_last_up_to_date(trainer)

    def _bring_last_up_to_date(self, trainer: Trainer) -> None:
        if self.save_last and (self._validated or self._last_global_step_saved != trainer.global_step):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._validated = False


def checkpoints_of(trainer: Trainer) -> Path:
    """Where the checkpoints of a trainer's run are, whatever `checkpoint.dirpath` says."""
    writers = (callback for callback in trainer.callbacks if isinstance(callback, RunCheckpoint))  # type: ignore[attr-defined]
    writer = next(writers, None)
    return checkpoint_directory(Path(trainer.default_root_dir), None if writer is None else writer.dirpath)


def newest_loadable(run: Path, dirpath: str | None = None) -> str | None:
    """The newest checkpoint of a run that can be read; None, with a line of log, when there is none.

    A file that cannot be read is named in a warning and passed over.

    Args:
        run: the run's directory (`trainer.default_root_dir`).
        dirpath: folder of the checkpoints, if not the usual one.
    """
    folder = checkpoint_directory(run, dirpath)
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        try:
            if path.is_file():
                torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception as error:  # any damage at all disqualifies the file, and the user is told
            rank_zero_warn(f"ckpt_path auto: '{path}' is passed over, it cannot be read: {error}")
            continue
        rank_zero_info(f"ckpt_path auto: going on from '{path}'.")
        return str(path)
    rank_zero_info(f"ckpt_path auto: no checkpoint in '{folder}', starting fresh.")
    return None
