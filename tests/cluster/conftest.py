"""Runs of the launchers in `cluster/`: once for all tests and test processes, as each costs many imports."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]


RECIPE = """
model:
  class_path: ImageClassifier
  init_args:
    model: test_vit
    num_classes: 10
    model_args: {img_size: 32}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002}}
data:
  class_path: CIFAR100DataModule
  init_args: {sample: true, sample_size: 80, batch_size: 8, num_workers: 0, drop_last: true,
    transforms: {image_size: 32, train_crop: pad}}
trainer:
  deterministic: true
  max_epochs: 2
  log_every_n_steps: 1
  logger: false
"""


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """`shared(name, make)`: a folder that `make` filled, in whichever test process came first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder = base / name
        with FileLock(base / "cluster.lock"):
            if not folder.exists():
                folder.mkdir()
                try:
                    make(folder)
                except BaseException as error:
                    (folder / "failed").write_text(str(error))
                    raise
        if (folder / "failed").exists():
            pytest.fail((folder / "failed").read_text())
        return folder

    return once


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The recipe's file."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of the launchers: one thread, loopback, and a `featherlight` that is this checkout's."""
    programs = tmp_path_factory.mktemp("bin")
    for name, module in (("featherlight", "featherlight"), ("torchrun", "torch.distributed.run")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    # other tests of this process leave the variables of their ranks behind: two jobs would meet at one port
    strange = ("SLURM_", "MASTER_", "PL_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "NODE_", "GROUP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strange)}
    return {
        **kept,
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


@pytest.fixture(scope="session")
def options():
    """What a user types for a machine without GPUs; both launchers' configs say something else."""
    return ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]


@pytest.fixture(scope="session")
def slurm_module():
    """`slurm.py`, which stands beside this file."""
    specification = importlib.util.spec_from_file_location("slurm", Path(__file__).with_name("slurm.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def torchrun(environment, recipe, options, slurm_module):
    """`torchrun(folder, *arguments)`: `cluster/torchrun.sh` with two processes on this machine."""

    def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        places = ["--trainer.default_root_dir", folder, "--data.init_args.root", folder / "data"]
        line = ["--config", recipe, *options, *places, *arguments]
        (port,) = slurm_module.free_ports(1)
        variables = {"NPROC": "2", "MASTER_PORT": str(port), "MAX_RESTARTS": "2"}
        return subprocess.run(
            ["bash", "cluster/torchrun.sh", *map(str, line)],
            cwd=REPOSITORY,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=350,
        )

    return run


@pytest.fixture(scope="session")
def undisturbed(shared, torchrun):
    """The folder of a run on two ranks that nothing happened to."""

    def make(folder: Path) -> None:
        done = torchrun(folder)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return shared("undisturbed", make)
