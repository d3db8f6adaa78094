"""Lines for a log file."""

import re

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar

from callbacks.run.log_lines import EpochLines, LogLines
from featherlight_cli import make_cli
from lightning_modules import ImageClassifier

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


@pytest.fixture
def classifier():
    return ImageClassifier("test_vit", num_classes=4, model_args={"img_size": 32})


def test_a_line_for_each_batch_and_epoch(trainer, blob_data, classifier, capsys):
    run = trainer(
        callbacks=[LogLines(seconds=0)], enable_progress_bar=True, max_epochs=2, num_sanity_val_steps=1
    )
    run.fit(classifier, blob_data(length=24))
    found = lines(capsys)
    number = r"[\d.e+-]+"
    assert re.fullmatch(rf"sanity_check, batch 1/1, {number} batches/s, 0:00:\d\d left", found[0])
    assert re.fullmatch(
        rf"epoch 1/2, step 1, batch 1/3, loss {number}, lr {number}, first batch done", found[1]
    )
    assert re.fullmatch(
        rf"epoch 1/2, step 2, batch 2/3, loss {number}, lr {number}, {number} batches/s, 0:00:\d\d left",
        found[2],
    )
    assert [line.split(",")[0] for line in found[4:7]] == ["validate"] * 3
    assert re.fullmatch(
        rf"epoch 1/2, step 3, done in 0:00:\d\d, loss {number}, val/loss {number}, val/top1 {number}",
        found[7],
    )
    assert found[10].startswith("epoch 2/2, step 6, batch 3/3")
    assert found[10].endswith(", 0:00:00 left")
    run.test(classifier, blob_data(length=24), verbose=False)
    assert [line[:14] for line in lines(capsys)] == ["test, batch 1/", "test, batch 2/", "test, batch 3/"]


def test_few_lines_where_nothing_takes_long(trainer, blob_data, classifier, capsys):
    run = trainer(callbacks=[LogLines()], enable_progress_bar=True, max_epochs=2, val_check_interval=2)
    run.fit(classifier, blob_data(length=24))
    found = [re.sub(r"0:00:\d\d", "0:00:00", line).split(",")[:3] for line in lines(capsys)]
    assert found == [
        ["epoch 1/2", " step 1", " batch 1/3"],
        ["epoch 1/2", " step 2", " validated in 0:00:00"],
        ["epoch 1/2", " step 3", " done in 0:00:00"],
        ["epoch 2/2", " step 5", " validated in 0:00:00"],
        ["epoch 2/2", " step 6", " done in 0:00:00"],
    ]


@pytest.mark.parametrize("kind", [LogLines, EpochLines])
def test_an_epoch_that_was_not_validated_repeats_no_older_metrics(
    trainer, blob_data, classifier, capsys, kind
):
    run = trainer(callbacks=[kind()], max_epochs=3, check_val_every_n_epoch=2, enable_progress_bar=True)
    run.fit(classifier, blob_data(length=16))
    done = [line for line in lines(capsys) if "done in" in line]
    assert ["val/top1" in line for line in done] == [False, True, False]


def test_the_time_left_counts_steps_where_they_end_the_run(
    trainer, blob_data, classifier, capsys, monkeypatch
):
    clock = iter(range(0, 10_000_000, 10))
    monkeypatch.setattr("callbacks.run.log_lines.time.monotonic", lambda: float(next(clock)))
    run = trainer(callbacks=[LogLines(seconds=0)], enable_progress_bar=True, max_epochs=-1, max_steps=6)
    run.fit(classifier, blob_data(length=32))
    left = [re.search(r"step (\d), .* ([\d:]+) left", line) for line in lines(capsys) if " loss " in line]
    steps = {int(match[1]): match[2] for match in left if match}
    assert sorted(steps) == [2, 3, 4, 5, 6]
    assert steps[6] == "0:00:00"
    assert all(value != "0:00:00" for step, value in steps.items() if step < 6)


def test_the_pace_is_of_the_batches_since_the_last_line(monkeypatch):
    bar = LogLines(seconds=0)
    bar._printed, bar._counted = 10.0, 4
    monkeypatch.setattr("callbacks.run.log_lines.time.monotonic", lambda: 12.0)
    assert bar._pace(10) == "3 batches/s"


def test_only_the_first_rank_prints(trainer, blob_data, classifier, capsys):
    bar = LogLines(seconds=0)
    bar.disable()
    trainer(callbacks=[bar], enable_progress_bar=True).fit(classifier, blob_data(length=8))
    assert lines(capsys) == []
    with pytest.raises(ValueError, match="seconds must not be negative, got -1"):
        LogLines(-1)


RECIPE = """
model:
  class_path: ImageClassifier
  init_args: {model: test_vit, num_classes: 10, model_args: {img_size: 32}}
data: {class_path: CIFAR100DataModule, init_args: {root: data, sample: true}}
trainer: {accelerator: cpu, devices: 1}
"""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], None),
        (["--trainer.enable_progress_bar", "false"], []),
        (["--trainer.callbacks+=RichProgressBar"], [RichProgressBar]),
        (["--trainer.callbacks+=LogLines", "--trainer.callbacks.seconds=5"], [LogLines]),
    ],
)
def test_the_command_takes_lines_where_there_is_no_terminal(tmp_path, monkeypatch, terminal, options, chosen):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    cli = make_cli(["--config", "recipe.yaml", *options], run=False)
    kinds = (RichProgressBar, LogLines)
    bars: list[type[Callback]] = [type(c) for c in cli.trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]
    assert bars == (([RichProgressBar] if terminal else [LogLines]) if chosen is None else chosen)
