"""Save and leave in good order when a scheduler takes the machine away."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from callbacks.run.checkpointing import checkpoints_of

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""The later one wins where both arrive: who cancels a job does not want it requeued."""


class Preemption(Callback):
    """On SIGTERM or SIGUSR1, ends the run so that the same command can go on where it was.

    While `fit` trains, the signal only raises a flag. All ranks agree on it after the optimiser step or the
    validation batch in progress, so that they save the same state to `last.ckpt`, and never between a
    backward pass and its optimiser step. At any other time (data are prepared, features cached, a model is
    calibrated, tested) there is nothing to wait for: what is finished is on the disk, and the process leaves
    at once. It exits with status 128 + signal. A second signal changes nothing.

    On SLURM, SIGUSR1 (`sbatch --signal=SIGUSR1@600`) also puts the job back into the queue; SIGTERM
    (`scancel`) does not.

    Args:
        requeue: on SLURM, `scontrol requeue` the job after SIGUSR1.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self._when: Literal["at once", "after the batch", "never"] = "never"
        self._received = 0
        self._step = 0
        self._shared_batches: list[int] = []
        self._previous: dict[int, Any] = {}
        self._nested = False
        self._left = False
        self._trainer: Trainer | None = None

    # Whose the signals are

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Take both signals over now, before `trainer` prepares data, which is before it calls `setup`.

        A process that leaves keeps them to its end: SLURM sends SIGTERM to a job that it requeues.
        """
        self._take(trainer)
        try:
            yield
        finally:
            if not self._left:
                self._give_back()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take both signals over, and keep Lightning from doing so."""
        self._nested = bool(self._previous)
        self._take(trainer)
        if self._previous:
            # Lightning's handler broadcasts to the other ranks in the middle of whatever they do
            trainer._signal_connector.register_signal_handlers = _leave_signals_alone  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run is complete: a signal that comes now is too late."""
        self._when = "never"
        if not self._nested:
            self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has failed by itself."""
        if not self._left and not self._nested:
            self._give_back()

    def _take(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._when, self._received, self._left = "at once", 0, False
        if self._previous:
            return
        try:
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the command has held SIGUSR1 back till now
        except ValueError:  # only the main thread may
            rank_zero_warn(
                "Preemption: not in the main thread, so SIGTERM and SIGUSR1 will not save a checkpoint."
            )

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous, self._trainer, self._when = {}, None, "never"

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._when == "never":
            return
        if self._received != signal.SIGTERM:
            self._received = number
        if self._when == "at once":
            self._leave(self._received, "leaving; what was finished is kept")

    # When fit obeys

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save, though not in the middle of this check."""
        self._when = "after the batch"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Obey what came during the sanity check."""
        self._when, self._step = "after the batch", trainer.global_step
        self._save_if_told(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave at the first optimiser-step boundary after the signal."""
        if trainer.global_step == self._step:
            return  # gradients are still being accumulated
        self._step = trainer.global_step
        self._save_if_told(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how many batches all ranks have: after those, they can agree."""
        batches = [int(n) if n != float("inf") else 0 for n in trainer.num_val_batches]
        if trainer.world_size > 1 and trainer.state.fn == TrainerFn.FITTING:
            shared = torch.tensor(batches, device=pl_module.device)
            batches = trainer.strategy.reduce(shared, reduce_op="min").tolist()
        self._shared_batches = batches

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave a validation inside `fit`, which is done anew when the run goes on."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if trainer.world_size == 1 or batch_idx < self._shared_batches[dataloader_idx]:
            self._save_if_told(trainer, pl_module)

    def _save_if_told(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = self._agree(trainer, pl_module)
        if number == 0:
            return
        self._when = "never"
        if trainer.validating:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # the averages stand in the model's place
                    callback.on_validation_epoch_end(trainer, pl_module)
        path = checkpoints_of(trainer) / "last.ckpt"
        with torch.inference_mode(False):  # a validation's
            trainer.save_checkpoint(path, weights_only=False)
        self._leave(number, f"saved '{path}' at step {trainer.global_step}, leaving")

    def _agree(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The signal that any rank has received, or 0."""
        if trainer.world_size == 1:
            return self._received
        place = SIGNALS.index(signal.Signals(self._received)) + 1 if self._received else 0
        received = torch.tensor(place, device=pl_module.device)
        return (0, *SIGNALS)[int(trainer.strategy.reduce(received, reduce_op="max"))]

    def _leave(self, number: int, outcome: str) -> NoReturn:
        at_once, self._when, self._left = self._when == "at once", "never", True
        rank_zero_info(f"{signal.Signals(number).name}: {outcome}.")
        launcher = self._trainer.strategy.launcher if self._trainer is not None else None
        if at_once and launcher is not None:
            launcher.kill(number)  # the other ranks, where Lightning has started them
        if self.requeue and number == signal.SIGUSR1 and getattr(rank_zero_only, "rank", 0) == 0:
            _requeue()
        raise SystemExit(128 + number)


def _leave_signals_alone() -> None:
    """In the place of `_SignalConnector.register_signal_handlers`."""


def _requeue() -> None:
    """Put this SLURM job, if it is one, back into the queue."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # one task has the number of the whole array as its SLURM_JOB_ID
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        rank_zero_warn(f"Preemption: job {job} could not be requeued ({problem}); submit it again.")
    else:
        rank_zero_info(f"Job {job} is back in the queue.")
