"""`cluster/torchrun.sh`: a worker that dies costs one restart, and no number changes."""

import subprocess
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_a_lost_worker_costs_one_restart(tmp_path, undisturbed, torchrun):
    arguments = ["--checkpoint.every_n_train_steps", "1", "--trainer.callbacks+", "probes.LoseRankAt"]
    arguments += ["--trainer.callbacks.step", "7", "--trainer.callbacks.folder", tmp_path]
    done = torchrun(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "attempts").read_text().split() == ["0", "1"]
    found, wanted = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (tmp_path, undisturbed)
    )
    assert found["global_step"] == wanted["global_step"] == 10
    for key, value in wanted["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key


def test_the_launchers_leave_the_last_word_to_the_user(tmp_path, environment):
    for name in ("srun", "torchrun"):
        script = tmp_path / name
        script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        script.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "NNODES": "2", "NPROC": "4"}
    environment = {**environment, **slurm, "PATH": f"{tmp_path}:{environment['PATH']}"}
    users = ["--config", "my recipe.yaml", "--trainer.devices", "3", "--ckpt_path", "a.ckpt"]
    for launcher, trainer in (("slurm.sbatch", "slurm"), ("torchrun.sh", "torchrun")):
        command = ["bash", f"cluster/{launcher}", *users]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        typed = done.stdout.splitlines()
        typed = typed[typed.index("fit") + 1 :]
        assert typed == [
            *("--config", f"configs/trainer/{trainer}.yaml"),
            *("--config", "{trainer: {num_nodes: 2, devices: 4}, ckpt_path: auto}"),
            *users,
        ]
