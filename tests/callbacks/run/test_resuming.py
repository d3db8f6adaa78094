"""Runs of a real Trainer, interrupted at every step and resumed, against the uninterrupted run."""

import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import Dataset

from callbacks.run.resuming import ExactResume
from datamodules.loading import EpochSampler, ResumableLoader, SeededDataset
from lightning_modules.parts.schedules import WarmupSchedule

EPOCHS = 3
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Points(Dataset):
    def __init__(self, length: int) -> None:
        self.points = torch.randn(length, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.points[index], "index": index}


def jitter(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "x": sample["x"] + 0.1 * torch.randn(4)}


class PointsDataModule(LightningDataModule):
    """4 training batches of 4 and 2 of validation, unless other numbers are given."""

    def __init__(self, length: int = 14, ranks: tuple[int, int] = (0, 1), **options: Any) -> None:
        super().__init__()
        self.length, self.ranks = length, ranks
        self.options = {"batch_size": 4, **options}

    def train_dataloader(self) -> ResumableLoader:
        data = SeededDataset(Points(self.length), 3, jitter)
        sampler = EpochSampler(data, seed=3, rank=self.ranks[0], num_replicas=self.ranks[1])
        return ResumableLoader(data, sampler=sampler, **self.options)

    def val_dataloader(self) -> ResumableLoader:
        data = SeededDataset(Points(3))
        return ResumableLoader(data, batch_size=2, sampler=EpochSampler(data, shuffle=False, tail="keep"))


class Recorder(LightningModule):
    """A small network with batch statistics, momentum and a schedule; it writes down all that it sees."""

    def __init__(self, interval: str = "step") -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.interval = interval
        self.trace: list[tuple[Any, ...]] = []
        self.fail_at: int | None = None
        self.counters: tuple[int, ...] = ()  # stays empty when there is nothing left to train

    def note(self, kind: str, *details: Any) -> None:
        self.trace.append((kind, self.current_epoch, self.global_step, *details))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.fail_at == len([entry for entry in self.trace if entry[0] == "train"]):
            raise RuntimeError("broken step")
        self.note("train", batch_idx, tuple(batch["index"].tolist()))
        return self.network(batch["x"]).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.note("val", batch_idx, tuple(batch["index"].tolist()))

    def on_train_epoch_start(self) -> None:
        self.note("epoch start")

    def on_train_epoch_end(self) -> None:
        self.note("epoch end")

    def on_train_end(self) -> None:
        loggers_step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.counters = (self.global_step, self.current_epoch, loggers_step)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.interval == "estimated":  # Lightning makes the loaders now, before it reads the checkpoint
            assert self.trainer.estimated_stepping_batches == 12
        optimizer = torch.optim.SGD(
            self.parameters(), lr=0.1 if self.interval == "cosine" else 0.05, momentum=0.9
        )
        if self.interval == "cosine":
            self.cosine = WarmupSchedule(optimizer)
            epochs = max(1, self.trainer.max_epochs or 1)
            self.cosine.bind(epochs, int(self.trainer.estimated_stepping_batches) // epochs)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.cosine, "interval": "step"}}
        interval = "epoch" if self.interval == "epoch" else "step"
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3 if interval == "step" else 1, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class Saver(Callback):
    """Saves at each call of a hook, and remembers how much had been seen."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        self.seen: list[int] = []
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, module: Recorder, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{len(self.seen)}.ckpt")
            self.seen.append(len(module.trace))


class Kill(Callback):
    """Ends the process before a training step, as nothing else would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, module: Recorder, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    *callbacks: Callback,
    loader: dict[str, Any] | None = None,
    resume: Path | None = None,
    exact: bool = True,
    interval: str = "step",
    fail_at: int | None = None,
    **options: Any,
) -> tuple[Recorder, Trainer]:
    seed_everything(0, verbose=False)
    module = Recorder(interval)
    module.fail_at = fail_at
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        **{"max_epochs": EPOCHS, **options},
        callbacks=[*([ExactResume()] if exact else []), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, PointsDataModule(**loader or {}), ckpt_path=resume, weights_only=True)
    return module, trainer


def assert_same_end(expected: Recorder, resumed: Recorder) -> None:
    """The same weights, and the same numbers of steps and epochs."""
    for key, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert resumed.counters in (expected.counters, ())


def steps(trace: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [entry for entry in trace if entry[0] == "train"]


LOADERS = [
    {},
    {"num_workers": 2},
    {"num_workers": 1, "persistent_workers": True},
]
TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "accumulate unevenly": {"accumulate_grad_batches": 3},
    "validate twice": {"val_check_interval": 0.5},
    "validate every second epoch": {"check_val_every_n_epoch": 2},
    "validate by steps": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "no validation": {"limit_val_batches": 0},
    "limit": {"limit_train_batches": 3},
    "limit, no validation": {"limit_train_batches": 3, "limit_val_batches": 0},
    "steps": {"max_steps": 10, "max_epochs": -1},
    "steps, no validation": {"max_steps": 10, "max_epochs": -1, "limit_val_batches": 0},
}


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        *((options, "step") for options in TRAINERS.values()),
        (TRAINERS["plain"], "epoch"),
        (TRAINERS["plain"], "estimated"),
    ],
    ids=[*TRAINERS, "schedule by epochs", "schedule of known length"],
)
def test_saved_after_a_batch(tmp_path, options, interval):
    """Everything that follows is the same: batches, validation, hooks, counters, weights."""
    saver = Saver(tmp_path, "on_train_batch_end")
    expected, trainer = run(saver, interval=interval, **options)
    assert len(saver.seen) == trainer.fit_loop.epoch_loop.batch_progress.total.ready
    for number, seen in enumerate(saver.seen):
        resumed, _ = run(resume=tmp_path / f"{number}.ckpt", interval=interval, **options)
        rest = expected.trace[seen:]
        assert_same_end(expected, resumed)
        if number == len(saver.seen) - 1 and "max_steps" in options:
            assert resumed.trace == []  # the run is over before it begins
            continue
        assert resumed.trace == rest


@pytest.mark.parametrize("loader", LOADERS[1:], ids=str)
def test_saved_after_a_batch_with_workers(tmp_path, loader):
    saver = Saver(tmp_path, "on_train_batch_end")
    expected, _ = run(saver, loader=loader)
    plain, _ = run()
    assert plain.trace == expected.trace
    assert_same_end(plain, expected)
    for number, seen in enumerate(saver.seen):
        resumed, _ = run(resume=tmp_path / f"{number}.ckpt", loader=loader)
        assert resumed.trace == expected.trace[seen:]
        assert_same_end(expected, resumed)


@pytest.mark.parametrize(
    "options", [TRAINERS["plain"], TRAINERS["validate twice"], TRAINERS["steps"]], ids=str
)
def test_loader_alone_resumes_batches_and_weights(tmp_path, options):
    """Without the callback Lightning may skip a validation, but never a batch."""
    saver = Saver(tmp_path, "on_train_batch_end")
    expected, _ = run(saver, exact=False, **options)
    for number, seen in enumerate(saver.seen):
        resumed, _ = run(resume=tmp_path / f"{number}.ckpt", exact=False, **options)
        assert steps(resumed.trace) == steps(expected.trace[seen:])
        resumed.counters = ()  # the loggers' step may be one behind
        assert_same_end(expected, resumed)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS.keys())
def test_saved_between_epochs(tmp_path, options, hook):
    """The next epoch begins at its first batch. The hooks of the end of the epoch are not run twice."""
    saver = Saver(tmp_path, hook)
    expected, _ = run(saver, **options)
    for number, seen in enumerate(saver.seen):
        resumed, _ = run(resume=tmp_path / f"{number}.ckpt", **options)
        done = 1 if hook == "on_train_epoch_end" else 0  # the module's own hook comes after the callbacks'
        assert resumed.trace == expected.trace[seen + done :]
        assert_same_end(expected, resumed)


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 3}], ids=str
)
def test_saved_inside_a_step(tmp_path, options):
    """As a signal handler does: the batch of that step is drawn again."""
    saver = Saver(tmp_path, "on_train_batch_start")
    expected, _ = run(saver, **options)
    for number, seen in enumerate(saver.seen):
        resumed, _ = run(resume=tmp_path / f"{number}.ckpt", **options)
        assert resumed.trace == expected.trace[seen:]
        assert_same_end(expected, resumed)


def test_saved_inside_validation(tmp_path):
    """It starts anew, so that its metrics are whole."""
    saver = Saver(tmp_path, "on_validation_batch_end")
    expected, _ = run(saver)
    for number, seen in enumerate(saver.seen):
        resumed, _ = run(resume=tmp_path / f"{number}.ckpt")
        start = max(i for i in range(seen) if expected.trace[i][0] == "train") + 1
        assert resumed.trace == expected.trace[start:]
        assert_same_end(expected, resumed)


@pytest.mark.parametrize("fail_at", [0, 2, 4, 7])
def test_saved_on_exception(tmp_path, fail_at):
    expected, _ = run()
    keep = ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True)
    with pytest.raises(RuntimeError, match="broken step"):
        run(keep, fail_at=fail_at)
    saved = tmp_path / "broken.ckpt"
    if fail_at in (0, 4):  # Lightning saves nothing new: no step since the last checkpoint
        saved = next(tmp_path.glob("*.ckpt"), None)
    resumed, _ = run(resume=saved)
    assert steps(resumed.trace) == steps(expected.trace)[fail_at:]
    assert_same_end(expected, resumed)


@pytest.mark.parametrize("name", ["plain", "accumulate", "validate twice", "steps"])
def test_model_checkpoint_at_every_step(tmp_path, name):
    options = TRAINERS[name]
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    expected, _ = run(keep, **options)
    checkpoints = sorted(tmp_path.glob("step=*.ckpt"), key=os.path.getmtime)
    optimizer_steps = {entry[2] for entry in steps(expected.trace)}
    assert {f"step={step + 1}.ckpt" for step in optimizer_steps} == {path.name for path in checkpoints}
    for step, path in enumerate(checkpoints[:-1]):
        seen = (
            max(i for i, entry in enumerate(expected.trace) if entry[0] == "train" and entry[2] == step) + 1
        )
        resumed, _ = run(resume=path, **options)
        assert resumed.trace == expected.trace[seen:]
        assert_same_end(expected, resumed)


def _killed(folder: Path, step: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    run(ModelCheckpoint(folder, every_n_train_steps=1, save_last=True), Kill(step), **options)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        *((step, {}) for step in range(1, 12)),
        (4, {"loader": LOADERS[1]}),
        (7, {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_killed(tmp_path, step, options):
    """``kill -9``, then ``last.ckpt``: no more is lost than the batches since then."""
    expected, _ = run(**options)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, step, options))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    again = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    resumed, _ = run(again, resume=tmp_path / "last.ckpt", **options)
    done = step // options.get("accumulate_grad_batches", 1) * options.get("accumulate_grad_batches", 1)
    assert steps(resumed.trace) == steps(expected.trace)[done:]
    validations = [entry for entry in resumed.trace if entry[0] == "val"]
    assert validations == [entry for entry in expected.trace if entry[0] == "val"][-len(validations) :]
    assert_same_end(expected, resumed)


def test_gradients_of_an_unfinished_accumulation_are_saved(tmp_path):
    saver = Saver(tmp_path, "on_train_batch_end")
    run(saver, accumulate_grad_batches=2)
    kept = [
        "accumulated_gradients" in torch.load(tmp_path / f"{i}.ckpt", weights_only=True) for i in range(4)
    ]
    assert kept == [True, False, True, False]


# other batches


def seen_of_epoch(trace: list[tuple[Any, ...]], epoch: int) -> list[int]:
    return [index for entry in steps(trace) if entry[1] == epoch for index in entry[4]]


EIGHTS = {"length": 32, "batch_size": 8}


@pytest.mark.parametrize(
    ("batch_size", "options", "before"),
    [
        (4, {}, {}),
        (16, {}, {}),
        (12, {}, {}),
        (4, {"accumulate_grad_batches": 2}, {}),
        (4, {"val_check_interval": 0.5}, {"val_check_interval": 0.5}),
        (16, {"max_steps": 9, "max_epochs": -1}, {"max_steps": 9, "max_epochs": -1}),
        (16, {"limit_val_batches": 0}, {"limit_val_batches": 0}),
        (16, {}, {"accumulate_grad_batches": 2}),
        (8, {"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_each_sample_comes_once_an_epoch_with_other_batches(tmp_path, batch_size, options, before):
    """Whichever batch the checkpoint follows; what waited in an accumulation is done again."""
    saver = Saver(tmp_path, "on_train_batch_end")
    expected, _ = run(saver, loader=EIGHTS, interval="epoch", **before)
    for number, seen in enumerate(saver.seen[: 9 if "max_steps" not in options else 8]):
        loader = {"length": 32, "batch_size": batch_size}
        resumed, trainer = run(resume=tmp_path / f"{number}.ckpt", loader=loader, interval="epoch", **options)
        epoch, done = divmod(number, 4)
        stepped = (done + 1) // before.get("accumulate_grad_batches", 1)
        taken = seen_of_epoch(expected.trace[:seen], epoch)[
            : 8 * stepped * before.get("accumulate_grad_batches", 1)
        ]
        last = steps(resumed.trace)[-1][1] if "max_steps" in options else EPOCHS  # that one is cut off
        epochs = range(epoch, last)
        for present in epochs:
            whole = (taken if present == epoch else []) + seen_of_epoch(resumed.trace, present)
            assert sorted(whole) == list(range(32)), (number, present)
        if "max_steps" in options:
            assert trainer.global_step == 9
        ends = [entry[1] for entry in resumed.trace if entry[0] == "epoch end"]
        assert ends[: len(epochs)] == list(epochs)
        validations = {entry[1] for entry in resumed.trace if entry[0] == "val"}
        assert "limit_val_batches" in options or set(epochs) <= validations


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_each_sample_comes_once_an_epoch_with_other_ranks(tmp_path, before, after):
    savers = [Saver(tmp_path / str(rank), "on_train_batch_end") for rank in range(before)]
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    firsts = [
        run(saver, loader={**EIGHTS, "batch_size": 4, "ranks": (rank, before)}, interval="epoch")[0]
        for rank, saver in enumerate(savers)
    ]
    for number in (0, 2, 5):
        path = tmp_path / "0" / f"{number}.ckpt"
        seconds = [
            run(resume=path, loader={**EIGHTS, "batch_size": 4, "ranks": (rank, after)}, interval="epoch")[0]
            for rank in range(after)
        ]
        epoch = number // (8 // before)
        parts = [first.trace[: saver.seen[number]] for first, saver in zip(firsts, savers, strict=True)]
        parts += [second.trace for second in seconds]
        whole = sorted(index for part in parts for index in seen_of_epoch(part, epoch))
        assert whole == list(range(32))


def test_an_epoch_without_a_whole_batch_left_ends(tmp_path):
    """After 16 of 30 samples no batch of 16 is left where the incomplete one is dropped."""
    saver = Saver(tmp_path, "on_train_batch_end")
    loader = {"length": 30, "drop_last": True}
    run(saver, loader=loader, interval="epoch")
    for number in (3, 4, 5, 6):
        resumed, _ = run(
            resume=tmp_path / f"{number}.ckpt", loader={**loader, "batch_size": 16}, interval="epoch"
        )
        first = [entry for entry in resumed.trace if entry[1] == 0]
        assert [entry[0] for entry in first] == ["val", "val", "epoch end"]
        assert len(steps(resumed.trace)) == 2


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_a_schedule_in_steps_keeps_its_place_with_other_batches(tmp_path, hook, batch_size):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            rates.append(module.cosine.get_last_lr()[0])

    run(Saver(tmp_path, hook), loader=EIGHTS, interval="cosine", max_epochs=8)
    loader = {**EIGHTS, "batch_size": batch_size}
    resumed, _ = run(Rates(), resume=tmp_path / "3.ckpt", loader=loader, interval="cosine", max_epochs=8)
    assert len(rates) == 4 * 32 // batch_size
    assert rates[0] == pytest.approx(0.05)
    assert rates[len(rates) // 2] == pytest.approx(0.1 * (1 - 0.5**0.5) / 2)
    assert resumed.cosine.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_a_schedule_in_steps_inside_an_epoch(tmp_path):
    run(Saver(tmp_path, "on_train_batch_end"), loader=EIGHTS, interval="cosine", max_epochs=8)
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            rates.append(module.cosine.get_last_lr()[0])

    loader = {**EIGHTS, "batch_size": 4}
    resumed, _ = run(Rates(), resume=tmp_path / "17.ckpt", loader=loader, interval="cosine", max_epochs=8)
    assert len(rates) == 28
    assert rates[0] == pytest.approx(0.05 * (1 + math.cos(math.pi * 36 / 64)))
    assert resumed.cosine.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_a_run_of_so_many_steps_keeps_its_schedule_in_steps(tmp_path):
    options = {"max_steps": 10, "max_epochs": -1, "interval": "cosine"}
    run(Saver(tmp_path, "on_train_batch_end"), loader=EIGHTS, **options)
    resumed, trainer = run(resume=tmp_path / "4.ckpt", loader={**EIGHTS, "batch_size": 4}, **options)
    assert trainer.global_step == 10
    assert resumed.cosine.last_epoch == 10
    assert resumed.cosine.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_a_schedule_that_cannot_be_converted_is_refused_with_both_values(tmp_path):
    run(Saver(tmp_path, "on_train_batch_end"), loader=EIGHTS)
    expected = "StepLR.*4 in an epoch .batch_size 8 on 1 ranks.*8 .batch_size 4 on 1 ranks.*WarmupSchedule"
    with pytest.raises(MisconfigurationException, match=expected):
        run(resume=tmp_path / "1.ckpt", loader={**EIGHTS, "batch_size": 4})
    run(resume=tmp_path / "1.ckpt", loader={**EIGHTS, "batch_size": 4}, interval="epoch")


class Plateau(Recorder):
    """Its metric never improves, so every step of the schedule counts."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/x", 1.0 + self.current_epoch)

    def on_train_epoch_start(self) -> None:
        self.trace.append((self.current_epoch, self.optimizers().param_groups[0]["lr"]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.plateau, "monitor": "val/x"}}


@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end"]
)
def test_a_plateau_schedule_misses_no_step(tmp_path, monkeypatch, hook):
    monkeypatch.setitem(globals(), "Recorder", Plateau)
    saver = Saver(tmp_path, hook)
    expected, _ = run(saver)
    rates = [entry for entry in expected.trace if isinstance(entry[0], int)]
    assert rates == [(0, 0.1), (1, 0.1), (2, 0.05)]
    assert expected.plateau.get_last_lr() == [0.025]
    for number in range(len(saver.seen)):
        resumed, trainer = run(resume=tmp_path / f"{number}.ckpt")
        started = [entry for entry in resumed.trace if isinstance(entry[0], int)]
        assert started == rates[len(rates) - len(started) :]
        if trainer.fit_loop._combined_loader is not None and resumed.counters:
            assert resumed.plateau.get_last_lr() == [0.025]
