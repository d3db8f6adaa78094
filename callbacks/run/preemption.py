"""Save and leave in good order when a scheduler takes the machine away."""

import os
import signal
import subprocess
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.run.checkpointing import checkpoints_of

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """On SIGTERM or SIGUSR1, writes `last.ckpt` after the optimiser step in progress, and ends the run.

    The signal only raises a flag; all ranks agree on it after the batch, so that they save the same step,
    and never between a backward pass and its optimiser step. The process then exits with status 128 +
    signal; a job that starts the same command again with `--ckpt_path auto` goes on where it was.

    Args:
        requeue: on SLURM, put the job back into the queue (`scontrol requeue`) after saving.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self._received = 0
        self._step = 0
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the signal of an earlier run."""
        self._received = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over both signals (Lightning has registered its own by now)."""
        self._step = trainer.global_step
        try:
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        except ValueError:  # only the main thread may
            rank_zero_warn(
                "Preemption: not in the main thread, so SIGTERM and SIGUSR1 will not save a checkpoint."
            )

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop at the first optimiser-step boundary after the signal."""
        if trainer.global_step == self._step:
            return  # gradients are still being accumulated
        self._step = trainer.global_step
        number = self._agree(trainer, pl_module)
        if number == 0:
            return
        path = checkpoints_of(trainer) / "last.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(
            f"{signal.Signals(number).name}: saved '{path}' at step {trainer.global_step}, leaving."
        )
        job = os.environ.get("SLURM_JOB_ID")
        if self.requeue and job is not None and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=False)
        raise SystemExit(128 + number)

    def _agree(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The signal that any rank has received, or 0."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=pl_module.device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
