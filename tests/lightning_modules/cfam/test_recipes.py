"""The small recipe by the real command: each setting trains, resumes bit by bit, tests and predicts."""

import csv
import json
from pathlib import Path

import pytest
import torch

import featherlight_cli

CONFIGS = Path(__file__).parents[3] / "configs" / "cfam"
SMALL = """
model:
  init_args:
    image_size: [48, 16]
    context_length: 40
data:
  init_args:
    sample_identities: 16
    context_length: 40
    transforms: {image_size: [48, 16]}
    batch_size: 8
trainer:
  max_epochs: 2
  limit_train_batches: 3
  enable_progress_bar: false
  logger: false
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`featherlight COMMAND` with the quick start made small, and what comes on top of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)

    def run(name, *more, folder="run", configs=()):
        files = [CONFIGS / "quickstart.yaml", *configs, "small.yaml"]
        line = [part for file in files for part in ("--config", str(file))]
        featherlight_cli.run([name, *line, "--trainer.default_root_dir", str(tmp_path / folder), *more])

    return run


def weights(folder):
    files = sorted(Path(folder).rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    return torch.load(files[-1], weights_only=True)["state_dict"]


def test_quick_start_trains_tests_predicts_and_resumes_bit_by_bit(command, tmp_path):
    command("fit")
    command("test", "--ckpt_path", "auto")
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert {"test/R1", "test/mAP", "test/mSD"} <= set(metrics)
    gallery = str(tmp_path / "data" / "cfam_quickstart" / "images")
    question = ["--data.init_args.query", "red shoes", "--data.init_args.gallery", gallery]
    command("predict", "--ckpt_path", "auto", *question, "--data.init_args.index", "index")
    rows = list(csv.DictReader((tmp_path / "run" / "retrieval.csv").open()))
    assert [row["query"] for row in rows] == ["red shoes"] * 10
    assert (tmp_path / "index" / "index.json").exists()
    command("fit", "--trainer.max_epochs", "1", folder="again")
    command("fit", "--ckpt_path", "auto", folder="again")
    whole, resumed = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", ["clip", "irra"])
def test_baselines_are_the_same_module_without_the_other_parts(name, command, tmp_path):
    command("fit", "--trainer.max_epochs", "1", configs=[CONFIGS / f"{name}.yaml"])
    parts = {key.split(".")[0] for key in weights(tmp_path / "run")}
    assert parts == {"base_model"} | ({"classifier"} if name == "irra" else set())
