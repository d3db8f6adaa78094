"""Callbacks that tests plug into real `featherlight` processes."""

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SignalAt(Callback):
    """Sends this process a signal in the middle of an optimiser step."""

    def __init__(self, step: int, name: Literal["SIGKILL", "SIGTERM", "SIGUSR1"]) -> None:
        self.step = step
        self.number = getattr(signal, name)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class LossCurve(Callback):
    """Writes the loss of every step, averaged over the ranks, one a line."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean").item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text("\n".join(map(repr, self.losses)))


class PoisonAt(Callback):
    """Makes a weight not a number before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))


class HoldAt(Callback):
    """On a SLURM job's first attempt, waits before a step until `<folder>/go` is there.

    `<folder>/waiting_<rank>` says that it waits.
    """

    def __init__(self, step: int, folder: str) -> None:
        self.step = step
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self.step or "SLURM_RESTART_COUNT" in os.environ:
            return
        (self.folder / f"waiting_{trainer.global_rank}").touch()
        deadline = time.monotonic() + 600
        while not (self.folder / "go").exists():
            assert time.monotonic() < deadline, "nobody said go"
            time.sleep(0.05)


class LoseRankAt(Callback):
    """On torchrun's first attempt, the last rank dies before a step.

    `<folder>/attempts` gets a line an attempt.
    """

    def __init__(self, step: int, folder: str) -> None:
        self.step = step
        self.file = Path(folder) / "attempts"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                print(os.environ["TORCHELASTIC_RESTART_COUNT"], file=file)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
