"""`--seeds`: one process a seed, each in a folder of its own."""

import subprocess
import sys

import pytest

import featherlight as featherlight_module
import featherlight_sweep


@pytest.fixture
def runs(monkeypatch):
    """What was run: (arguments, sub-folder); a seed of 13 fails."""
    seen = []
    popen = subprocess.Popen

    def run(command, env):
        assert command[0] == sys.executable
        seen.append((command[2:], env["FEATHERLIGHT_RUN_SUBFOLDER"]))
        return popen([sys.executable, "-c", f"raise SystemExit({2 if command[-1] == '13' else 0})"])

    monkeypatch.setattr(featherlight_sweep.subprocess, "Popen", run)
    return seen


def test_each_seed_has_its_folder_and_the_next_command_is_printed(runs, capsys):
    options = ["--config", "my recipe.yaml", "--overwrite"]
    assert featherlight_module.main(["fit", "--seeds", "0", "7", *options]) == 0
    assert runs == [
        (["fit", *options, "--seed_everything", "0"], "seed_0"),
        (["fit", *options, "--seed_everything", "7"], "seed_7"),
    ]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "next: featherlight test --config 'my recipe.yaml' --ckpt_path auto --seeds 0 7"


def test_inside_the_folder_of_a_launcher(runs, monkeypatch):
    monkeypatch.setenv("FEATHERLIGHT_RUN_SUBFOLDER", "task_3")
    assert featherlight_module.main(["test", "--config", "a.yaml", "--seeds", "1"]) == 0
    assert runs == [(["test", "--config", "a.yaml", "--seed_everything", "1"], "task_3/seed_1")]


def test_a_seed_that_fails_ends_the_sweep(runs):
    assert featherlight_module.main(["fit", "--seeds", "13", "1"]) == 2
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds"], "expected whole numbers"),
        (["--seeds", "1", "1"], "each once"),
        (["--seeds", "-1"], "expected whole numbers"),
        (["--seeds", "1", "--seed_everything=2"], "without --seed_everything"),
        (["--seeds", "1", "--seeds", "2"], "given once"),
    ],
)
def test_what_is_no_list_of_seeds(runs, capsys, arguments, message):
    assert featherlight_module.main(["fit", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert runs == []
