"""How long a call takes, on a device that works asynchronously, within a budget of time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch


@dataclass(frozen=True)
class Budget:
    """Most warm-up calls, most timed calls, and seconds for both; one call of each kind is always made."""

    warmup: int
    repeats: int
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 10th and 90th percentile of `repeats` calls."""

    median: float
    p10: float
    p90: float
    repeats: int


def _silent() -> None:
    """No progress to show."""


def time_calls(
    call: Callable[[], object], device: torch.device, budget: Budget, progress: Callable[[], None] = _silent
) -> Timing:
    """Time `call` on `device`, which is synchronised before and after each repeat.

    Args:
        call: one forward pass.
        device: where it runs.
        budget: how often and how long; the warm-up takes at most a quarter of it, where one call is not
        longer.
        progress: called between the repeats, outside of the clock.
    """
    start = time.perf_counter()
    for count in range(budget.warmup):
        if count and time.perf_counter() - start > budget.seconds / 4:
            break
        call()
        _synchronize(device)
        progress()
    times: list[float] = []
    while len(times) < budget.repeats:
        begin = time.perf_counter()
        if times and begin - start + times[-1] > budget.seconds:
            break
        call()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
        progress()
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(median, p10, p90, len(times))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class BudgetBar:
    """A bar of seconds that shows itself after the first of them; drawn between calls, without a thread.

    Args:
        label: what is going on.
        seconds: the most that it is expected to take.
        enabled: False shows nothing.
    """

    def __init__(self, label: str, seconds: float, enabled: bool = True) -> None:
        from tqdm import tqdm

        self._seconds = seconds
        self._bar = tqdm(
            total=seconds,
            desc=label,
            bar_format="{desc} {bar} {n:.1f} of at most {total:.1f} s",
            delay=1.0,
            miniters=0,
            leave=False,
            disable=not enabled,
        )
        self._start = time.perf_counter()

    def __enter__(self) -> "BudgetBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __call__(self) -> None:
        """Move to the time that has passed."""
        elapsed = min(time.perf_counter() - self._start, self._seconds)
        self._bar.update(elapsed - self._bar.n)
