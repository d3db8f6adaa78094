"""A quantization that is killed between two windows ends with the very integers of one that was not."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from callbacks import CBQ, Preemption
from callbacks.quantization.reconstruction import Reconstruction
from tests.conftest import environment

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
    return ["test", "--config", str(config), *flat]


def test_a_run_that_is_killed_goes_on(call, prepared, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    process = prepared.start(command(killed), killed, environment(), killed / "output", killed / "errors")
    progress = killed / "run" / "cbq_progress.pt"
    deadline = time.monotonic() + 120
    while not progress.is_file():
        assert process.poll() is None, (killed / "errors").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert torch.load(progress, weights_only=True)["windows"] in (1, 2)
    assert not (killed / "run" / "dense").exists()

    for folder in (killed, whole):
        call(*command(folder), cwd=folder)
    found, wanted = (load_file(folder / "run" / "dense" / "model.safetensors") for folder in (killed, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_leaves_a_calibration_at_once_and_keeps_its_windows(
    tmp_path, make_model, tokens, trainer, monkeypatch, name, status
):
    def cbq() -> CBQ:
        return CBQ(bits=3, group_size=32, epochs=2, batch_size=4, baseline=False)

    step_loss, steps = Reconstruction._step_loss, []

    def signalled(task: Reconstruction, *arguments: object) -> torch.Tensor:
        steps.append(task.window[0])  # windows of two blocks, one further on each time
        if steps[-1] == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return step_loss(task, *arguments)

    monkeypatch.setattr(Reconstruction, "_step_loss", signalled)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as left:
            trainer(callbacks=[cbq(), Preemption()]).test(make_model(), tokens, verbose=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code == status
    assert steps == [0, 0, 0, 0, 1], "the first step of the second window is the last"
    assert torch.load(tmp_path / "cbq_progress.pt", weights_only=True)["windows"] == 1
    monkeypatch.undo()
    trainer(callbacks=[cbq(), Preemption()]).test(make_model(), tokens, verbose=False)
    assert json.loads((tmp_path / "cbq_report.json").read_text())["windows_loaded"] == 1
