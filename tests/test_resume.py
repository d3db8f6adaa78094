"""A run that is killed and resumed must end with the very weights of one that was not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent


RECIPE = """
model:
  class_path: ImageClassifier
  init_args:
    model: test_vit
    num_classes: 10
    model_args: {img_size: 32, drop_path_rate: 0.2, proj_drop_rate: 0.1}
    mixup: 0.4
    random_erasing: 0.3
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 0.002}
    lr_scheduler:
      class_path: WarmupSchedule
      init_args: {warmup_epochs: 0.5}
data:
  class_path: CIFAR100DataModule
  init_args: {root: data, sample: true, sample_size: 160, batch_size: 16, num_workers: 2, drop_last: true,
    transforms: {image_size: 32, train_crop: pad, auto_augment: rand-m9-mstd0.5-inc1}}
trainer:
  accelerator: cpu
  devices: 1
  deterministic: true
  max_epochs: 3
  log_every_n_steps: 1
  enable_progress_bar: false
checkpoint:
  every_n_train_steps: 4
"""


def final(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


def assert_same(first, second):
    assert first["global_step"] == second["global_step"] == 30
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    ours, theirs = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second))
    for index, state in ours.items():
        for key, value in state.items():
            assert torch.equal(value, theirs[index][key]), (index, key)


@pytest.fixture(scope="module")
def uninterrupted(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    call("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "run", cwd=folder)
    return final(folder / "run")


@pytest.mark.parametrize(
    ("name", "step", "status", "saved"),
    [
        (
            "SIGKILL",
            17,
            -9,
            16,
        ),  # in the middle of the second epoch: the steps since step 16 are lost and redone
        ("SIGTERM", 9, 143, 10),  # the last step of an epoch: finished, saved, left
        ("SIGUSR1", 13, 138, 14),
    ],
)
def test_resuming_ends_like_the_uninterrupted_run(
    featherlight, tmp_path, uninterrupted, name, step, status, saved
):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = ["fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "run", "--ckpt_path", "auto"]
    probe = ["--trainer.callbacks+", "probes.SignalAt", "--trainer.callbacks.step", step]
    first = featherlight(*arguments, *probe, "--trainer.callbacks.name", name, status=status)
    assert "starting fresh" in first.stdout + first.stderr
    assert final(tmp_path / "run")["global_step"] == saved
    second = featherlight(*arguments)
    assert "last.ckpt'" in second.stdout + second.stderr
    assert_same(uninterrupted, final(tmp_path / "run"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_give_the_loss_curve_of_one_process(featherlight, tmp_path):
    # no mixup here: it is drawn per process
    recipe = RECIPE.replace("mixup: 0.4", "mixup: 0.0").replace("random_erasing: 0.3", "random_erasing: 0.0")
    recipe = recipe.replace("drop_path_rate: 0.2, proj_drop_rate: 0.1", "drop_path_rate: 0.0")
    (tmp_path / "recipe.yaml").write_text(recipe)
    common = [
        "fit",
        "--config",
        "recipe.yaml",
        "--trainer.max_epochs",
        "1",
        "--trainer.callbacks+",
        "probes.LossCurve",
    ]
    featherlight(*common, "--trainer.callbacks.path", "one.txt", "--trainer.default_root_dir", "one")

    port = free_port()
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths}
    options = [*common, "--trainer.callbacks.path", "two.txt", "--trainer.default_root_dir", "two"]
    options += ["--config", str(REPOSITORY / "configs/trainer/torchrun.yaml"), "--trainer.num_nodes", "2"]
    options += [
        "--trainer.devices",
        "1",
        "--trainer.precision",
        "32-true",
        "--data.init_args.batch_size",
        "8",
    ]
    options += ["--trainer.accelerator", "cpu"]
    nodes = []
    for rank in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        log = open(tmp_path / f"node{rank}.log", "w")  # noqa: SIM115 (the process owns it)
        command = [*launcher, "-m", "featherlight", *options]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
    for rank, node in enumerate(nodes):
        assert node.wait(timeout=200) == 0, (tmp_path / f"node{rank}.log").read_text()[-3000:]

    one, two = ([float(x) for x in (tmp_path / name).read_text().split()] for name in ("one.txt", "two.txt"))
    assert len(one) == 10
    assert two == pytest.approx(one, rel=1e-4)
    whole, halves = (final(tmp_path / name)["state_dict"] for name in ("one", "two"))
    for key, value in whole.items():
        assert torch.allclose(value, halves[key], atol=1e-4), key
