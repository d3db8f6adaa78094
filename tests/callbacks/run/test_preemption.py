"""Signals in every phase of a real Trainer: what is saved, what is left, and what happens on SLURM."""

import os
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from callbacks.run.checkpointing import AtomicCheckpointIO
from callbacks.run.preemption import Preemption
from callbacks.run.resuming import ExactResume
from datamodules.loading import EpochSampler, ResumableLoader, SeededDataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Points(LightningDataModule):
    """3 training batches of 4, 4 of validation, test and prediction."""

    def __init__(self, interrupt: Any = None) -> None:
        super().__init__()
        self.interrupt = interrupt

    def prepare_data(self) -> None:
        if self.interrupt is not None:
            self.interrupt()

    def _loader(self, length: int, **order: Any) -> ResumableLoader:
        points = torch.randn(length, 4, generator=torch.Generator().manual_seed(0))
        data = SeededDataset(list(points))  # type: ignore[arg-type]
        return ResumableLoader(data, batch_size=4, sampler=EpochSampler(data, **order))

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(12, seed=3)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(16, shuffle=False, tail="keep")

    test_dataloader = val_dataloader


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.evaluated = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.evaluated += 1

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Interrupt(Callback):
    """Sends this process signals at the n-th call of a hook."""

    def __init__(self, hook: str, call: int, *numbers: int) -> None:
        self.left = call
        self.numbers = numbers
        setattr(self, hook, self.count)

    def count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def make(folder, *callbacks: Callback, **options: Any) -> tuple[Trainer, Small]:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[*callbacks, Preemption(), ExactResume()],
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    return trainer, Small()


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name that writes down what it is asked; the calls so far."""
    log = tmp_path / "scontrol.log"
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return lambda: log.read_text().splitlines() if log.exists() else []


def interrupted(folder, interrupt: Interrupt, *callbacks: Callback, status: int) -> tuple[Trainer, Small]:
    trainer, module = make(folder, *callbacks, interrupt)
    with pytest.raises(SystemExit) as left:
        trainer.fit(module, Points())
    assert left.value.code == status
    return trainer, module


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize(
    ("hook", "call", "step", "evaluated"),
    [
        ("on_validation_batch_start", 1, 0, 2),
        ("on_train_batch_start", 2, 2, 2),
        ("on_validation_batch_start", 2 + 1, 3, 2 + 1),  # the sanity check has two batches
        ("on_validation_batch_start", 2 + 2, 3, 2 + 2),
        ("on_validation_batch_start", 2 + 4, 3, 2 + 4),
        ("on_train_epoch_end", 1, 4, 2 + 4),
    ],
)
def test_fit_is_left_soon_and_goes_on_to_the_same_end(tmp_path, hook, call, step, evaluated, averaging):
    def average() -> list[Callback]:
        return [EMAWeightAveraging(decay=0.6)] if averaging else []

    whole, wanted = make(tmp_path / "whole", *average())
    whole.fit(wanted, Points())
    trainer, module = interrupted(tmp_path, Interrupt(hook, call, signal.SIGUSR1), *average(), status=138)
    assert (trainer.global_step, module.evaluated) == (step, evaluated)
    saved = tmp_path / "checkpoints" / "last.ckpt"
    resumed, found = make(tmp_path, *average())
    resumed.fit(found, Points(), ckpt_path=saved, weights_only=True)
    assert resumed.global_step == whole.global_step == 6
    evaluations = {0: 2 + 8, 4: 4}  # an unfinished validation is done anew
    assert found.evaluated == evaluations.get(step, 8)
    for key, value in wanted.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key
    for left, right in zip(
        whole.optimizers[0].state.values(), resumed.optimizers[0].state.values(), strict=True
    ):
        assert torch.equal(left["momentum_buffer"], right["momentum_buffer"])


def test_a_second_signal_does_not_break_the_save(tmp_path, monkeypatch, scontrol):
    save = torch.save

    def disturbed(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **options)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(torch, "save", disturbed)
    interrupted(tmp_path, Interrupt("on_train_batch_start", 1, signal.SIGUSR1), status=138)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert scontrol() == ["requeue 7"]


@pytest.mark.parametrize(
    ("numbers", "status", "calls"),
    [
        ([signal.SIGUSR1], 138, ["requeue 7"]),
        ([signal.SIGTERM], 143, []),
        ([signal.SIGUSR1, signal.SIGTERM], 143, []),
        ([signal.SIGTERM, signal.SIGUSR1], 143, []),
    ],
)
def test_only_sigusr1_requeues(tmp_path, scontrol, numbers, status, calls):
    interrupted(tmp_path, Interrupt("on_train_batch_start", 1, *numbers), status=status)
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert scontrol() == calls


def test_a_task_of_an_array_requeues_itself_alone(tmp_path, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    interrupted(tmp_path, Interrupt("on_train_batch_start", 1, signal.SIGUSR1), status=138)
    assert scontrol() == ["requeue 7_3"]


def test_a_job_that_cannot_be_requeued_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"job 7 could not be requeued .*submit it again"):
        interrupted(tmp_path, Interrupt("on_train_batch_start", 1, signal.SIGUSR1), status=138)


@pytest.mark.parametrize(
    ("number", "status", "calls"), [("SIGTERM", 143, []), ("SIGUSR1", 138, ["requeue 7"])]
)
@pytest.mark.parametrize("hook", ["on_test_start", "on_test_batch_start", "on_test_end"])
def test_test_is_left_at_once(tmp_path, scontrol, number, status, calls, hook):
    trainer, module = make(tmp_path, Interrupt(hook, 1, getattr(signal, number)))
    with pytest.raises(SystemExit) as left:
        trainer.test(module, Points(), verbose=False)
    assert left.value.code == status
    assert module.evaluated == (4 if hook == "on_test_end" else 0)
    assert scontrol() == calls


def test_the_command_watches_before_data_are_prepared(tmp_path, scontrol):
    trainer, module = make(tmp_path)
    preemption = next(c for c in trainer.callbacks if isinstance(c, Preemption))  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as left, preemption.watching(trainer):
        trainer.fit(module, Points(lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    os.kill(os.getpid(), signal.SIGTERM)  # SLURM's, when the job goes back into the queue
    assert left.value.code == 138
    assert scontrol() == ["requeue 7"]
    assert not (tmp_path / "checkpoints").exists(), "nothing was trained"


def test_a_finished_run_is_not_taken_back(tmp_path, scontrol):
    trainer, module = make(tmp_path, Interrupt("on_fit_end", 1, signal.SIGUSR1))
    preemption = next(c for c in trainer.callbacks if isinstance(c, Preemption))  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGUSR1)
    with preemption.watching(trainer):
        trainer.fit(module, Points())
        os.kill(os.getpid(), signal.SIGUSR1)
    assert trainer.global_step == 6
    assert scontrol() == []
    assert signal.getsignal(signal.SIGUSR1) is before


def test_lightnings_handlers_stay_out(tmp_path):
    # the private name that `Preemption` replaces: its handler broadcasts in the middle of anything
    trainer, module = make(tmp_path)
    assert callable(trainer._signal_connector.register_signal_handlers)
    seen = []
    watch = Interrupt("on_train_batch_start", 1)
    watch.count = lambda *_: seen.append(signal.getsignal(signal.SIGTERM))  # type: ignore[method-assign]
    watch.on_train_batch_start = watch.count  # type: ignore[method-assign]
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGTERM)
    trainer.fit(module, Points())
    assert isinstance(getattr(seen[0], "__self__", None), Preemption)
    assert signal.getsignal(signal.SIGTERM) is before
