"""Loader workers that leave a scheduler's signals to the process that they read for.

SLURM sends SIGUSR1 and SIGTERM to every process of a job step. A worker that dies of one takes the run with
it before anything is saved.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from threading import Thread
from typing import Any

from torch.utils.data import DataLoader

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Deaf:
    """A `worker_init_fn` that ignores both signals, unless the process that reads sends SIGTERM.

    That one ends its workers so when it ends itself, and then waits for them.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # macOS, which has no SLURM either, does not tell the sender
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            Thread(target=_end_with_the_parent, daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        else:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.then is not None:
            self.then(worker)


def _end_with_the_parent() -> None:
    """Take the SIGTERMs, which are blocked in all threads, and obey the parent's."""
    parent = parent_process()
    while True:
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if parent is None or sender == parent.pid:
            os._exit(0)


@contextmanager
def deaf_workers(loader: DataLoader[Any]) -> Iterator[None]:
    """Within it the workers of `loader` may be started; they ignore SIGTERM and SIGUSR1 from the first on.

    Both signals are blocked meanwhile. A worker inherits that, forked or spawned, until it ignores them;
    whatever reaches this process waits.
    """
    if not loader.num_workers:
        yield
        return
    own = loader.worker_init_fn
    loader.worker_init_fn = _Deaf(own)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if (loader.multiprocessing_context or multiprocessing).get_start_method() != "fork":
            resource_tracker.ensure_running()  # which unblocks SIGTERM
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        loader.worker_init_fn = own
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
