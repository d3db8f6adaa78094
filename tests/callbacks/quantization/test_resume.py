"""A quantization that is killed between two windows ends with the very integers of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[3]


def command(folder: Path) -> list[str]:
    """Three windows of some seconds each, on a random model."""
    options = {
        "--trainer.default_root_dir": folder / "run",
        "--data.init_args.root": folder / "text",
        "--data.init_args.sample_size": 20000,
        "--data.init_args.n_calibration": 16,
        "--trainer.callbacks.epochs": 12,
        "--trainer.enable_progress_bar": "false",
    }
    config = folder / "recipe.yaml"
    recipe = (REPOSITORY / "configs/cbq/quickstart.yaml").read_text()
    config.write_text(recipe.partition("    - class_path: TextWriter")[0])
    flat = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "featherlight", "test", "--config", str(config), *flat]


def started(folder: Path) -> subprocess.Popen:
    folder.mkdir()
    return subprocess.Popen(
        command(folder),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors").open("w"),
    )


def test_a_run_that_is_killed_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = started(killed)
    progress = killed / "run" / "cbq_progress.pt"
    deadline = time.monotonic() + 120
    while not progress.is_file():
        assert process.poll() is None, (killed / "errors").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(progress, weights_only=True)["windows"] in (1, 2)
    assert not (killed / "run" / "dense").exists()

    again = subprocess.run(command(killed), cwd=killed, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert again.returncode == 0
    assert started(whole).wait(timeout=200) == 0, (whole / "errors").read_text()[-3000:]
    found, wanted = (load_file(folder / "run" / "dense" / "model.safetensors") for folder in (killed, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
