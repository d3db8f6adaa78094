"""Fixtures that every test may use: one thread a process, quiet runs, a tiny labelled data set."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset

from tests.hermetic import CheckoutGuard
from tests.prepared import Prepared

REPOSITORY = Path(__file__).parent.parent

torch.set_num_threads(1)
# autograd starts here, without threads: where torch.compile came before the first backward pass of a process,
# it starts some, and no fork of that process can train any more
torch.ones(1, requires_grad=True).sum().backward()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that hands out the tests sees the whole session
        config.pluginmanager.register(CheckoutGuard(REPOSITORY))


class Blobs(Dataset):
    """Noise images whose brightest corner is their class: `image`, `label`, `index` as the contracts say."""

    def __init__(self, length: int = 32, size: int = 32, classes: int = 4) -> None:
        self.length, self.size, self.classes = length, size, classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = 0.5 * torch.rand(3, self.size, self.size, generator=generator)
        label, half = index % self.classes, self.size // 2
        row, column = divmod(label % 4, 2)
        image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 0.4
        return {"image": image, "label": torch.tensor(label), "index": torch.tensor(index)}


class BlobData(LightningDataModule):
    """A DataModule over `Blobs` for tests of methods and callbacks."""

    def __init__(self, length: int = 32, batch_size: int = 8, size: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.blobs = Blobs(length, size, classes)
        self.batch_size = batch_size
        self.num_classes = classes
        self.class_names = [f"corner {index}" for index in range(classes)]
        self.root = "memory"

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.blobs, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.fixture(autouse=True)
def _seeded():
    seed_everything(0, verbose=False)


@pytest.fixture(autouse=True)
def _loggers_restored():
    """A benchmark that a test calls in this process silences Lightning; the next test must hear it again."""
    loggers = [
        logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)
    ]
    levels = [(logger, logger.level) for logger in [logging.root, *loggers]]
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)
    for logger, level in levels:
        logger.setLevel(level)


@pytest.fixture
def blob_data():
    """The class, so that a test can choose sizes."""
    return BlobData


@pytest.fixture
def trainer(tmp_path):
    """A factory of quiet CPU trainers that write under `tmp_path`."""

    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "max_epochs": 1,
        }
        return Trainer(**{**defaults, **options})

    return make


SCRIPT = Path(sys.executable).with_name("featherlight")


@pytest.fixture(scope="session")
def prepared():
    """What forks for the calls of the command, see `tests.prepared`."""
    process = Prepared(SCRIPT)
    yield process
    process.close()


def environment() -> dict[str, str]:
    """Of a call: `tests/probes.py` can be imported there."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}


@pytest.fixture(scope="session")
def call(prepared, tmp_path_factory):
    """Run the command in a process of its own, in the folder `cwd`; `status` is what it must end with.

    `script: true` starts the installed `featherlight`, as a user types it, where there is one.
    """
    folder = tmp_path_factory.mktemp("output")
    command = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "featherlight"]

    def run(
        *arguments, cwd: Path, status: int | None = 0, script: bool = False
    ) -> subprocess.CompletedProcess:
        words = [*map(str, arguments)]
        if script:
            done = subprocess.run(
                [*command, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240
            )
        else:
            out, err = folder / "out", folder / "err"
            code = prepared.start(words, cwd, environment(), out, err).wait(240)
            done = subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())
        if status is not None:
            assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return run


@pytest.fixture(scope="session")
def on_two_ranks(prepared):
    """Run the command in the folder `cwd` in two processes that find what torchrun gives to its ranks."""

    def run(*arguments, cwd: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        job |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        calls, logs = [], [cwd / f"rank_{rank}.log" for rank in (0, 1)]
        for rank, log in enumerate(logs):
            own = {**environment(), **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            calls.append(prepared.start(arguments, cwd, own, Path(os.devnull), log))
        codes = [call.wait(240) for call in calls]
        assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)

    return run


@pytest.fixture
def featherlight(call, tmp_path):
    """`call` in `tmp_path`."""

    def run(*arguments, cwd: Path = tmp_path, **options) -> subprocess.CompletedProcess:
        return call(*arguments, cwd=cwd, **options)

    return run
