"""Curves in the logs of every run: often enough for a short one, with the learning rate beside the losses."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

POINTS = 10  # an epoch, or a run that is shorter
LONGEST = 50  # steps between two points; Lightning's own interval


class LogInterval(Callback):
    """Sets `log_every_n_steps` by the length of an epoch: ten points in a short one, else every 50 steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The number of batches is known now."""
        lengths = [trainer.num_training_batches / trainer.accumulate_grad_batches]
        lengths += [trainer.max_steps] if trainer.max_steps > 0 else []
        trainer.log_every_n_steps = int(max(1, min(LONGEST, min(lengths) / POINTS)))  # type: ignore[attr-defined]


class LearningRates(LearningRateMonitor):
    """Logs the learning rates of all groups at each logging step, where there is a logger."""

    def __init__(self) -> None:
        super().__init__(logging_interval="step")

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Name the rates."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log them."""
        if trainer.loggers:
            super().on_train_batch_start(trainer, *args, **kwargs)
