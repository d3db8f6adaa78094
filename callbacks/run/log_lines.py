"""How far a run is, in a log file: a line now and then instead of a bar that is redrawn."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from callbacks.run.directory import announce


class LogLines(ProgressBar):
    """Prints a line after the first training batch, then every so many seconds, and at the end of each epoch.

    The line has epoch, step, batch, loss, learning rate, batches per second, and the time that the run still
    takes at the pace it has had so far, validations included. Only rank 0 prints. The command plugs it in
    where its output goes to no terminal.

    Args:
        seconds: between two lines; 0 prints one for each batch.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        if seconds < 0:
            raise ValueError(f"seconds must not be negative, got {seconds}.")
        self.seconds = seconds
        self._enabled = True
        self._printed: float | None = None  # when, and how many batches were done by then
        self._counted = 0
        self._began = {"run": 0.0, "epoch": 0.0, "loop": 0.0}
        self._first = (0, 0)  # batches and steps that were done before this process began
        self._validated = -1  # step of the last validation

    def enable(self) -> None:
        """Print from now on."""
        self._enabled = True

    def disable(self) -> None:
        """Print no more (Lightning does this on all ranks but the first)."""
        self._enabled = False

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks; a resumed run has batches behind it, and may begin inside an epoch."""
        self._began["run"] = self._began["epoch"] = time.monotonic()
        self._first = _batches_done(trainer), trainer.global_step
        self._printed = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._began["epoch"] = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        pace = self._pace(_batches_done(trainer))
        if pace is None:
            return
        parts = [
            f"step {trainer.global_step}",
            f"batch {_share(batch_idx + 1, trainer.num_training_batches)}",
        ]
        loss = trainer.callback_metrics.get("train/loss")
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            loss = outputs["loss"]
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        if trainer.optimizers:
            parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.3g}")
        parts.append(pace or "first batch done")
        left = self._seconds_left(trainer)
        if left is not None:
            parts.append(f"{_duration(left)} left")
        self._say(trainer, _epoch(trainer), *parts)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the epoch came to."""
        seconds = time.monotonic() - self._began["epoch"]
        self._say(trainer, *_epoch_parts(trainer, seconds, self._validated))

    # Evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the loop's clock; the next line is due after some seconds of it."""
        self._start_loop()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation in the middle of an epoch; at its end they follow anyway."""
        self._restart_interval(_batches_done(trainer))
        self._validated = trainer.global_step
        epoch_loop = trainer.fit_loop.epoch_loop
        if (
            trainer.state.fn == "fit"
            and not trainer.sanity_checking
            and not epoch_loop.batch_progress.is_last_batch
        ):
            took = _duration(time.monotonic() - self._began["loop"])
            self._say(
                trainer,
                _epoch(trainer),
                f"step {trainer.global_step}",
                f"validated in {took}",
                *_metrics(trainer),
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if it is time."""
        totals = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._evaluated(trainer, batch_idx, totals[dataloader_idx])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if it is time."""
        self._evaluated(trainer, batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if it is time."""
        self._evaluated(trainer, batch_idx, trainer.num_predict_batches[dataloader_idx])

    # The lines

    def _start_loop(self) -> None:
        self._began["loop"] = time.monotonic()
        self._restart_interval(0)

    def _restart_interval(self, batches: int) -> None:
        self._printed, self._counted = time.monotonic(), batches

    def _evaluated(self, trainer: Trainer, batch_idx: int, total: int | float) -> None:
        done = batch_idx + 1
        pace = self._pace(done)
        if pace is None:
            return
        parts = [f"batch {_share(done, total)}", pace]
        if total != float("inf"):
            parts.append(
                f"{_duration((time.monotonic() - self._began['loop']) / done * (total - done))} left"
            )
        stage = trainer.state.stage
        self._say(trainer, stage.value if stage is not None else "evaluation", *parts)

    def _pace(self, batches: int) -> str | None:
        """None while no line is due; else the batches per second since the last line, empty at the first."""
        now = time.monotonic()
        if not self._enabled or (self._printed is not None and now - self._printed < self.seconds):
            return None
        pace = ""
        if self._printed is not None and now > self._printed:
            pace = f"{(batches - self._counted) / (now - self._printed):.3g} batches/s"
        self._restart_interval(batches)
        return pace

    def _seconds_left(self, trainer: Trainer) -> float | None:
        """At the pace since this process began to train; None if the run has no end, or nothing is known."""
        elapsed = time.monotonic() - self._began["run"]
        batches, steps = _batches_done(trainer) - self._first[0], trainer.global_step - self._first[1]
        shares = []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and batches > 1:
            total = trainer.max_epochs * trainer.num_training_batches
            shares.append((total - _batches_done(trainer)) / batches)
        if trainer.max_steps > 0 and steps > 1:
            shares.append((trainer.max_steps - trainer.global_step) / steps)
        share = min(shares, default=float("inf"))
        return None if share == float("inf") else elapsed * max(share, 0.0)

    def _say(self, trainer: Trainer, *parts: str) -> None:
        if self._enabled:
            announce(trainer, ", ".join(parts))


class EpochLines(Callback):
    """Prints the line of each epoch's end, as `LogLines` does, above a progress bar that is redrawn."""

    def __init__(self) -> None:
        self._began = 0.0
        self._validated = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the epoch came to."""
        seconds = time.monotonic() - self._began
        announce(trainer, ", ".join(_epoch_parts(trainer, seconds, self._validated)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when it was."""
        self._validated = trainer.global_step


def _epoch_parts(trainer: Trainer, seconds: float, validated: int) -> list[str]:
    """What an epoch came to, at its end; of the validation only where it was at this step."""
    parts = [_epoch(trainer), f"step {trainer.global_step}", f"done in {_duration(seconds)}"]
    if (loss := trainer.callback_metrics.get("train/loss")) is not None:
        parts.append(f"loss {float(loss):.4g}")
    return parts + (_metrics(trainer) if validated == trainer.global_step else [])


def _batches_done(trainer: Trainer) -> int:
    """Training batches of the run so far, the one in progress included."""
    return trainer.fit_loop.total_batch_idx + 1


def _epoch(trainer: Trainer) -> str:
    last = trainer.max_epochs
    return f"epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")


def _share(done: int, total: int | float) -> str:
    return f"{done}/{total}" if total != float("inf") else str(done)


def _metrics(trainer: Trainer) -> list[str]:
    """What the last validation found."""
    return [
        f"{name} {float(value):.4g}"
        for name, value in sorted(trainer.callback_metrics.items())
        if name.startswith("val/")
    ]


def _duration(seconds: float) -> str:
    """`1:02:03`."""
    return str(timedelta(seconds=round(seconds)))
