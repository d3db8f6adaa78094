"""Checkpoints that survive: written atomically, kept by default, found again by `--ckpt_path auto`."""

import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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
        with _put_in_place(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Contents of a checkpoint, always without running code from it, see `read_checkpoint`."""
        return read_checkpoint(Path(path))


@contextmanager
def _put_in_place(target: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes `target` once it is whole and on the disk, or is removed.

    Raises:
        OSError: it could not be written; says what is left.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        left = (
            f"the previous '{target.name}' is intact" if target.exists() else "no file of that name was there"
        )
        raise OSError(f"The checkpoint '{target}' could not be written ({error}); {left}.") from error


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in `<run>/checkpoints`, with a `last.ckpt` that is always there.

    What a run that was killed left behind is made good by the one that resumes: `last.ckpt` where the kill
    came between it and the last kept checkpoint, and checkpoints that should have made room for others.

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
        self._evaluates = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder."""
        self.dirpath = str(checkpoints_of(trainer))
        self._evaluates = stage != "fit"
        super().setup(trainer, pl_module, stage)

        self._validated = False  # since the last write; validation may leave a threshold or a score behind
        self._started = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was written; an evaluation writes nothing, and may read from any folder."""
        if not self._evaluates:
            super().load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what an earlier, killed run of this one should have removed."""
        super().on_train_start(trainer, pl_module)
        self._started = True
        self._remove_orphans(trainer)

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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the run was over before it began: make `last.ckpt` what the run went on from.

        A kill after the last kept checkpoint was written and before `last.ckpt` was leaves that to do.
        """
        source = trainer.ckpt_path
        if self._started or not self.save_last or source is None or not trainer.is_global_zero:
            return
        source, last = Path(source), Path(str(self.dirpath), f"{self.CHECKPOINT_NAME_LAST}.ckpt")
        inside = source.is_file() and source.resolve().parent == last.parent.resolve()
        if inside and not last.is_dir() and _is_behind(last, source, trainer.global_step):
            with _put_in_place(last) as file, open(source, "rb") as content:
                shutil.copyfileobj(content, file, 1 << 20)
            rank_zero_info(f"'{last}' was not up to date: it is a copy of '{source}' now.")

    def _remove_orphans(self, trainer: Trainer) -> None:
        """Delete checkpoints of this run that a kill kept from being deleted, see `save_top_k`.

        Only what this callback wrote, under a name of its own making, no later than where the run goes on.
        """
        source = trainer.ckpt_path
        if source is None or self.save_top_k < 0 or not trainer.is_global_zero:
            return
        folder = Path(str(self.dirpath))
        if Path(source).resolve().parent != folder.resolve():
            return
        known = {
            Path(path).name for path in (self.best_model_path, self.last_model_path, *self.best_k_models)
        }
        pattern = _pattern_of(self.filename or "{epoch}-{step}")
        for path in sorted(folder.glob("*.ckpt")):
            if path.name in known | {Path(source).name} or not pattern.fullmatch(path.stem):
                continue
            contents = _peek(path)
            ours = self.state_key in contents.get("callbacks", {})
            if ours and contents.get("global_step", math.inf) <= trainer.global_step:
                path.unlink(missing_ok=True)
                rank_zero_info(
                    f"'{path}' is removed: a killed run left it, and save_top_k is {self.save_top_k}."
                )

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


def chosen_checkpoint(command: str, given: str | None, run: Path, dirpath: str | None = None) -> str | None:
    """What `--ckpt_path` means for a command: only `fit` may start without a checkpoint that was asked for.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        given: `auto` (see `newest_loadable`), `best` (see `best_checkpoint`), `last`, or anything else, which
            is left alone.
        run: the run's directory.
        dirpath: `checkpoint.dirpath`.

    Raises:
        FileNotFoundError: there is no such checkpoint, and weights are to be evaluated.
        MisconfigurationException: `best` of a run that monitors nothing, or to be trained on.
    """
    folder = checkpoint_directory(run, dirpath)
    if given == "last" and command != "fit" and not (folder / "last.ckpt").exists():
        raise FileNotFoundError(f"{command} --ckpt_path last: there is no '{folder / 'last.ckpt'}'.")
    if given == "best":
        if command == "fit":
            raise MisconfigurationException(
                "fit --ckpt_path best: a run goes on from its newest checkpoint, which is `auto`; to start "
                "from the best weights, give the file as model.init_args.weights."
            )
        best = best_checkpoint(command, folder)
        rank_zero_info(f"ckpt_path best: '{best}'.")
        return best
    if given != "auto":
        return given
    path = newest_loadable(run, dirpath)
    if path is not None:
        rank_zero_info(f"ckpt_path auto: going on from '{path}'.")
    elif command == "fit":
        rank_zero_info(f"ckpt_path auto: no checkpoint in '{folder}', starting fresh.")
    else:
        raise FileNotFoundError(
            f"{command} --ckpt_path auto: there is no checkpoint in '{folder}' that can be read. Train first "
            "(`featherlight fit`), name a file, or leave --ckpt_path out to use the model's own weights."
        )
    return path


def best_checkpoint(command: str, folder: Path) -> str:
    """The checkpoint that a run's `checkpoint.monitor` chose, as its newest checkpoint remembers.

    Args:
        command: for messages.
        folder: of the checkpoints.

    Raises:
        FileNotFoundError: there is none, or it is gone.
        MisconfigurationException: the run monitored nothing.
    """
    newest = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        raise FileNotFoundError(f"{command} --ckpt_path best: there is no checkpoint in '{folder}'.")
    states = _peek(newest).get("callbacks", {})
    state: dict[str, Any] = next(
        (state for key, state in states.items() if key.startswith(RunCheckpoint.__qualname__)), {}
    )
    if not state.get("monitor") or not state.get("best_model_path"):
        raise MisconfigurationException(
            f"{command} --ckpt_path best: nothing chose a best one in '{folder}', as checkpoint.monitor was "
            "not set: write `auto` for the newest, or name a file."
        )
    path = folder / Path(state["best_model_path"]).name  # the folder may have moved since
    if not path.exists():
        raise FileNotFoundError(f"{command} --ckpt_path best: '{path}' was the best, and is not there.")
    return str(path)


def saved_option(path: str | None, name: str) -> Any:
    """A hyper-parameter of the model that wrote a checkpoint; None where there is no such file or value."""
    if path is None or not Path(path).is_file():
        return None
    return _peek(Path(path)).get("hyper_parameters", {}).get(name)


def check_free(run: Path, dirpath: str | None, ckpt_path: str | None) -> None:
    """Refuse to train into a folder that holds another run.

    Args:
        run: the run's directory.
        dirpath: `checkpoint.dirpath`.
        ckpt_path: what the run goes on from; a checkpoint of the folder itself means the same run.

    Raises:
        MisconfigurationException: there are checkpoints of a run that this one does not go on with.
    """
    folder = checkpoint_directory(run, dirpath)
    others = sorted(folder.glob("*.ckpt"))
    if not others or ckpt_path in ("last", "hpc", "registry"):
        return
    if ckpt_path is not None and Path(ckpt_path).resolve().parent == folder.resolve():
        return
    raise MisconfigurationException(
        f"fit: '{run}' holds a run already ({others[-1].name} in '{folder}'): go on with it by --ckpt_path "
        "auto, replace it with --overwrite, or choose another trainer.default_root_dir."
    )


def newest_loadable(run: Path, dirpath: str | None = None) -> str | None:
    """The newest checkpoint of a run that can be read; None when there is none.

    A file that cannot be read is named in a warning and passed over. To be sure, every byte of it is read and
    compared with the checksums that torch writes, newest file first, until one is
    whole; sharded checkpoints are folders, and are taken as they are.

    Args:
        run: the run's directory (`trainer.default_root_dir`).
        dirpath: folder of the checkpoints, if not the usual one.
    """
    folder = checkpoint_directory(run, dirpath)
    times = {path: os.stat(path, follow_symlinks=path.exists()).st_mtime_ns for path in folder.glob("*.ckpt")}
    found = sorted(times, key=lambda path: times[path], reverse=True)
    for path in found:
        try:
            if not path.is_dir():
                _verify(path)
        except Exception as error:  # any damage at all disqualifies the file, and the user is told
            rank_zero_warn(f"ckpt_path auto: '{path}' is passed over, it cannot be read: {error}")
            continue
        return str(path)
    return None


def _verify(path: Path) -> None:
    """Read all of a checkpoint file.

    Raises:
        Exception: whatever torch says of a file that it cannot read, or `BadZipFile` for a wrong checksum.
    """
    torch.load(path, map_location="meta", weights_only=True, mmap=True)
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"the checksum of its part '{broken}' is wrong")


def _peek(path: Path) -> dict[str, Any]:
    """A checkpoint without its tensors' values; empty if it cannot be read."""
    try:
        contents = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # whatever is wrong with it, it says nothing
        return {}
    return contents if isinstance(contents, dict) else {}


def _is_behind(last: Path, source: Path, step: int) -> bool:
    """Whether `last` is missing, damaged, or older than `source`, a checkpoint of optimiser step `step`."""
    try:
        _verify(last)
    except Exception:  # any damage
        return True
    saved = _peek(last).get("global_step", -1)
    return saved < step or (saved == step and last.stat().st_mtime_ns < source.stat().st_mtime_ns)


def _pattern_of(filename: str) -> re.Pattern[str]:
    """What the names look like that Lightning makes of a template such as `{epoch}-{val/loss:.2f}`."""
    literals = re.split(r"\{[^}]*\}", filename)
    return re.compile(".+".join(map(re.escape, literals)))
