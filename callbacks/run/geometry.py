"""Resuming with another batch size, number of ranks or accumulation: counters and schedules are converted.

Lightning counts batches and optimiser steps, which mean other amounts of training then. The loaders convert
their own positions, see `ResumableLoader`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules.parts.schedules import WarmupSchedule


@dataclass(frozen=True)
class Geometry:
    """How the samples of an epoch make batches and steps.

    Args:
        batch_size: samples of a batch on one rank.
        ranks: that share an epoch.
        accumulate_grad_batches: batches of an optimiser step.
        batches: of an epoch on one rank; infinite for a stream.
    """

    batch_size: int
    ranks: int
    accumulate_grad_batches: int
    batches: float

    @classmethod
    def of(cls, trainer: Trainer) -> "Geometry | None":
        """That of a trainer's training data; None before there are loaders."""
        combined = trainer.fit_loop._combined_loader
        if combined is None or not combined.flattened:
            return None
        loader = combined.flattened[0]
        ranks = getattr(getattr(loader, "sampler", None), "num_replicas", trainer.world_size)
        size = getattr(loader, "batch_size", None) or 1
        return cls(size, ranks, trainer.accumulate_grad_batches, trainer.num_training_batches)

    @property
    def samples(self) -> int:
        """Samples of a batch on all ranks."""
        return self.batch_size * self.ranks

    @property
    def steps(self) -> float:
        """Optimiser steps of an epoch."""
        return math.ceil(self.batches / self.accumulate_grad_batches) if self.batches < math.inf else math.inf

    def divides_alike(self, other: "Geometry") -> bool:
        """Whether batches and steps are made of the same numbers of samples, on as many ranks."""
        return str(self) == str(other)

    def __str__(self) -> str:
        return (
            f"batch_size {self.batch_size} on {self.ranks} ranks, accumulate_grad_batches "
            f"{self.accumulate_grad_batches}"
        )


def save_geometry(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Write down what the counters of a checkpoint count."""
    geometry = Geometry.of(trainer)
    if geometry is not None:
        checkpoint["geometry"] = asdict(geometry)


def convert_counters(trainer: Trainer, saved: dict[str, Any] | None, waiting: bool) -> bool:
    """Move counters and schedules that were restored from a checkpoint to where this run's own would be.

    Called when everything is restored and nothing has been trained. With the same batches, ranks and
    accumulation nothing is touched.

    Args:
        trainer: of the resumed run.
        saved: the checkpoint's `geometry`, see `save_geometry`; None in those of former versions.
        waiting: whether the checkpoint holds gradients of an unfinished accumulation. Those fit no other
            accumulation: its batches are drawn again.

    Returns:
        Whether anything was different.

    Raises:
        MisconfigurationException: a schedule counts steps and cannot be converted, or the loaders cannot
            go on inside the epoch; names both values.
    """
    now = Geometry.of(trainer)
    before = None if saved is None else Geometry(**saved)
    if now is None or before is None or now.divides_alike(before):
        return False
    epochs: Any = trainer.fit_loop.epoch_progress.current
    inside = epochs.ready > epochs.processed
    batches = _convert_batches(trainer, before, now, waiting) if inside else 0
    steps = batches / now.accumulate_grad_batches
    _convert_schedules(
        trainer, before, now, math.ceil(steps) if batches == now.batches else math.floor(steps)
    )
    rank_zero_info(f"Resuming with {now}; the checkpoint was written with {before}.")
    return True


def _convert_batches(trainer: Trainer, before: Geometry, now: Geometry, waiting: bool) -> int:
    """Set the counter of an epoch that is under way; gives the batches of it that count as done."""
    loop, loaders = trainer.fit_loop.epoch_loop, trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    if len(loaders) > 1 or not hasattr(loaders[0], "load_state_dict"):
        raise MisconfigurationException(
            f"The checkpoint was written inside an epoch with {before}; this run has {now}, and its loaders "
            "cannot go on there: resume with the same."
        )
    progress: Any = loop.batch_progress
    done = progress.current.processed
    if progress.is_last_batch or done >= before.batches:
        _count(progress, int(now.batches))
        return int(now.batches)
    if waiting:
        done -= done % before.accumulate_grad_batches
        loaders[0].load_state_dict({**loaders[0].state_dict(), "samples": done * before.samples})
    position = loaders[0].state_dict().get("samples", done * before.samples) // now.samples
    if position < now.batches:
        _count(progress, position)
        return position
    # nothing is left that makes a whole batch now: the state is that after an epoch's last batch
    _count(progress, int(now.batches))
    progress.is_last_batch = True
    progress.current.completed, progress.total.completed = (
        progress.current.processed,
        progress.total.processed,
    )
    loaders[0].load_state_dict({**loaders[0].state_dict(), "samples": int(now.batches) * now.samples})
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
        validation: Any = loop.val_loop.batch_progress
        counts = validation.total.completed
        validation.total.ready = validation.total.started = counts + 1
        validation.total.processed = counts
        validation.current.reset()
        validation.is_last_batch = False
    loop.update_restart_stage()
    return int(now.batches)


def _count(progress: Any, batches: int) -> None:
    """Set the batches of the epoch to `batches`, leaving the differences between the stages as they are."""
    difference = batches - progress.current.processed
    for counts in (progress.current, progress.total):
        for stage in ("ready", "started", "processed", "completed"):
            setattr(counts, stage, getattr(counts, stage) + difference)


def _convert_schedules(trainer: Trainer, before: Geometry, now: Geometry, steps: int) -> None:
    """Move the schedules that count steps to the same place in the run, `steps` into the present epoch."""
    by_steps = trainer.max_steps != -1 and trainer.estimated_stepping_batches == trainer.max_steps
    if by_steps or before.steps == now.steps or math.inf in (before.steps, now.steps):
        return  # a run of so many steps has its schedule in steps
    for config in trainer.lr_scheduler_configs:
        if config.interval != "step" or config.reduce_on_plateau:
            continue
        if not isinstance(config.scheduler, WarmupSchedule):
            raise MisconfigurationException(
                f"lr_scheduler {type(config.scheduler).__name__} counts optimiser steps: the checkpoint's "
                f"run had {before.steps} in an epoch ({before}), this one has {now.steps} ({now}). Resume "
                "with the same, let it step by epochs (lr_interval: epoch), or use WarmupSchedule, which "
                "is converted."
            )
        epochs: Any = trainer.fit_loop.epoch_progress.current
        config.scheduler.step(epochs.processed * int(now.steps) + steps)
