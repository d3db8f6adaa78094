"""Signals that SLURM sends to every process: loader workers ignore them, whichever way they were started."""

import multiprocessing
import os
import signal
import subprocess
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.loading import EpochSampler, ResumableLoader, SeededDataset
from datamodules.workers import SIGNALS


class Pids(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> int:
        return os.getpid()


class Marking:
    """A `worker_init_fn` of the user's."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def __call__(self, worker: int) -> None:
        # as early as a signal can come: before this worker has read anything
        os.kill(os.getpid(), signal.SIGTERM)
        (self.folder / f"{worker}").write_text(str(os.getpid()))


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_ignore_both_signals(tmp_path, start, workers):
    received = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in SIGNALS}
    try:
        data = SeededDataset(Pids())
        loader = ResumableLoader(
            data,
            batch_size=2,
            sampler=EpochSampler(data, shuffle=False),
            num_workers=workers,
            multiprocessing_context=start,
            worker_init_fn=Marking(tmp_path),
        )
        batches = iter(loader)
        pids = {int(pid) for _ in range(workers) for pid in next(batches)}
        assert pids == {int((tmp_path / str(worker)).read_text()) for worker in range(workers)}
        assert len(pids) == workers
        assert os.getpid() not in pids
        for name in ("USR1", "TERM", "USR1"):  # from another process, as SLURM does
            subprocess.run(["kill", f"-{name}", *map(str, pids)], check=True)
        assert torch.cat(list(batches)).unique().tolist() == sorted(pids), "all are read, by the same workers"
        assert isinstance(loader.worker_init_fn, Marking), "the loader is as it was"
        assert received == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1], "this process still hears"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_workers_end_when_their_process_tells_them_to():
    # multiprocessing does this at the end of the interpreter, and then waits for them
    data = SeededDataset(Pids())
    loader = ResumableLoader(data, batch_size=1, sampler=EpochSampler(data, shuffle=False), num_workers=1)
    batches = iter(loader)
    (pid,) = next(batches).tolist()
    (worker,) = [child for child in multiprocessing.active_children() if child.pid == pid]
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0
