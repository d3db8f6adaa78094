"""What the launchers type, and what the command makes of it: the last word is the user's."""

import subprocess
from pathlib import Path

import pytest
import yaml

from featherlight_cli import make_cli

REPOSITORY = Path(__file__).parents[2]
JOB = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "NNODES": "2", "NPROC": "4"}


@pytest.fixture
def typed(tmp_path, environment):
    """`typed(launcher, arguments, variables)`: the options that a launcher hands to `featherlight fit`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "torchrun"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (programs / name).chmod(0o755)

    def run(launcher: str, arguments: list[str], **variables: str) -> list[str]:
        done = subprocess.run(
            ["bash", f"cluster/{launcher}", *arguments],
            cwd=REPOSITORY,
            env={**environment, **JOB, **variables, "PATH": f"{programs}:{environment['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        words = done.stdout.splitlines()
        return words[words.index("fit") + 1 :]

    return run


@pytest.fixture
def compose(monkeypatch, tmp_path, recipe):
    """The configuration that options come to; a recipe of the user's is `my recipe.yaml`."""
    (tmp_path / "my recipe.yaml").write_text(recipe.read_text())
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    return lambda options: make_cli(options, run=False, with_trainer=False).config


@pytest.mark.parametrize("launcher", ["slurm.sbatch", "torchrun.sh"])
def test_the_users_word_is_last(typed, compose, launcher):
    recipe = ["--config", "my recipe.yaml"]
    plain = compose(words(typed(launcher, recipe)))
    assert (plain.trainer.num_nodes, plain.trainer.devices, plain.trainer.strategy) == (2, 4, "ddp")
    assert plain.trainer.precision == "bf16-mixed"
    assert plain.trainer.default_root_dir == "runs/my recipe", "the recipe names the run, not the launcher"
    options = ["--trainer.precision=32-true", "--trainer.devices=3", "--trainer.accelerator=cpu"]
    theirs = compose(words(typed(launcher, [*recipe, *options]))).trainer
    assert (theirs.precision, str(theirs.devices), theirs.accelerator) == ("32-true", "3", "cpu")
    assert theirs.num_nodes == 2
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"precision": "64-true", "num_nodes": 1}}))
    theirs = compose(words(typed(launcher, [*recipe, "--config", "mine.yaml"]))).trainer
    assert (theirs.precision, theirs.num_nodes, theirs.devices) == ("64-true", 1, 4)


def words(options: list[str]) -> list[str]:
    """For a parser without commands, which knows no `--ckpt_path`."""
    return [option.replace(", ckpt_path: auto", "") for option in options]


def test_both_go_on_from_the_newest_checkpoint_unless_told_otherwise(typed):
    for launcher in ("slurm.sbatch", "torchrun.sh"):
        options = typed(launcher, ["--ckpt_path", "a.ckpt"])
        assert yaml.safe_load(options[3])["ckpt_path"] == "auto"
        assert options[4:] == ["--ckpt_path", "a.ckpt"]


def test_a_task_of_an_array_has_a_seed_and_a_folder(typed, compose, monkeypatch):
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_JOB_ID": "3"}
    options = words(
        typed("slurm.sbatch", ["--config", "my recipe.yaml", "--checkpoint.dirpath=kept"], **array)
    )
    monkeypatch.setenv("FEATHERLIGHT_RUN_SUBFOLDER", "seed_7")  # what the script exports, see test_slurm.py
    config = compose(options)
    assert config.seed_everything == 7
    assert config.trainer.default_root_dir == "runs/my recipe/seed_7"
    assert config.checkpoint.dirpath == "kept/seed_7"
    assert compose([*options, "--seed_everything=1"]).seed_everything == 1


def test_the_manifest_for_kubernetes_says_the_same(compose):
    (job,) = yaml.safe_load_all((REPOSITORY / "cluster" / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    command = container["command"]
    options = words(command[command.index("fit") + 1 :])
    config = compose([*options, "--trainer.precision=32-true"])
    assert (config.trainer.num_nodes, config.trainer.devices) == (2, int(job["spec"]["nprocPerNode"]))
    assert config.trainer.precision == "32-true"
    assert config.trainer.default_root_dir == "/runs/resnet50"
