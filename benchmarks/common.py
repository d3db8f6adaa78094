"""What the benchmarks share: turns that are fair, clocks, peak memory, processes of their own, tables."""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch


def turns(names: Sequence[str], repeats: int, seconds: float = float("inf")) -> Iterator[str]:
    """Every name once a round, each round beginning with another one: a drifting machine favours none.

    Args:
        names: of what is compared.
        repeats: rounds.
        seconds: after which no further round begins, once there were three.
    """
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - start > seconds:
            return
        first = turn % len(names)
        yield from [*names[first:], *names[:first]]


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    now: Callable[[], Any],
    seconds: float = float("inf"),
) -> dict[str, list[Any]]:
    """What `now` advanced by in every call, in `turns`, after one untimed round.

    Args:
        calls: by name.
        repeats: rounds.
        now: the clock; a number, or an array of several clocks.
        seconds: see `turns`.
    """
    for call in calls.values():
        call()
    times: dict[str, list[Any]] = {name: [] for name in calls}
    for name in turns(list(calls), repeats, seconds):
        start = now()
        calls[name]()
        times[name].append(now() - start)
    return times


def clock(device: str, threads: int) -> tuple[str, Callable[[], float]]:
    """What the time is called, and the function that reads it.

    With one thread on the CPU it is the process's own time, which other people's jobs disturb least.
    """
    if device == "cuda":
        return "wall time", synchronized_seconds
    return ("CPU time", time.process_time) if threads == 1 else ("wall time", time.perf_counter)


def synchronized_seconds() -> float:
    """Wall time once the GPU has done what it was told."""
    torch.cuda.synchronize()
    return time.perf_counter()


def cpu_and_wall() -> np.ndarray:
    """Both clocks in seconds, once the GPU, where there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.process_time(), time.perf_counter()])


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times faster, round by round."""
    return [one / other for one, other in zip(slow, fast, strict=True)]


# Memory


def forget_peak() -> None:
    """Return what is free to the system and let the peak start from here, as far as the system allows."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):  # neither exists outside of Linux
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_mebibytes() -> float:
    """Of the GPU if it is used, else of the process (on other systems than Linux since it started)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):
        return status_mebibytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def status_mebibytes(key: str) -> float:
    """A line of Linux's /proc/self/status: `VmRSS` is what is resident now, `VmHWM` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 2**10


def in_own_process(
    script: str, *arguments: object, own_pages: bool = False, python: str = sys.executable
) -> str:
    """The last line that a script prints when it runs in a process of its own.

    Args:
        script: its file.
        arguments: of its command line.
        own_pages: every tensor gets pages of its own that go back when it is freed: peaks repeat, at the cost
            of time.
        python: that runs it.
    """
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if own_pages else {})}
    command = [python, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.splitlines()[-1]


# Tables


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """The numbers as JSON, where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
