"""`ReduceLROnPlateau` over an interruption.

Lightning steps it at the very end of an epoch, after the checkpoints of that epoch are written, and not at
all in the epoch that a run resumes in; and the metric that it looks at is in no checkpoint. So every resumed
run would miss one of its steps.
"""

from typing import Any

import torch
from lightning.pytorch import Trainer


class PlateauSteps:
    """Keeps the step that is due with its metric, and takes it where Lightning does not."""

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}  # of the run that was interrupted
        self._due: list[tuple[int, float]] = []  # number of the scheduler, metric

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """For a checkpoint that is written now."""
        epochs: Any = trainer.fit_loop.epoch_progress.current
        ended = epochs.processed > epochs.completed
        return {
            "metrics": {name: value for name, _, value in self._monitored(trainer)},
            "due": self._steps(trainer) if ended else [],
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take what a checkpoint holds."""
        self._metrics = dict(state["metrics"]) if state else {}
        self._due = [(number, value) for number, value in state["due"]] if state else []

    def end_epoch(self, trainer: Trainer) -> None:
        """Note what Lightning is going to leave out in the epoch that the run resumed in."""
        if trainer.fit_loop.restarting:
            self._due = self._steps(trainer)
        self._metrics = {}

    def take(self, trainer: Trainer) -> None:
        """Take the steps that are due."""
        due, self._due = self._due, []
        for number, value in due:
            scheduler = trainer.lr_scheduler_configs[number].scheduler
            trainer.lightning_module.lr_scheduler_step(scheduler, torch.tensor(value))

    def _steps(self, trainer: Trainer) -> list[tuple[int, float]]:
        """The steps at the end of this epoch."""
        if not trainer.lightning_module.automatic_optimization:
            return []
        epoch = trainer.current_epoch + 1
        configs = trainer.lr_scheduler_configs
        return [
            (number, value)
            for _, number, value in self._monitored(trainer)
            if configs[number].interval == "epoch" and epoch % configs[number].frequency == 0
        ]

    def _monitored(self, trainer: Trainer) -> list[tuple[str, int, float]]:
        """Name of the metric, number of the scheduler and present value, where there is one."""
        found = []
        for number, config in enumerate(trainer.lr_scheduler_configs):
            name = config.monitor
            if not config.reduce_on_plateau or name is None:
                continue
            value = trainer.callback_metrics.get(name, self._metrics.get(name))
            if value is not None:
                found.append((name, number, float(value)))
        return found
