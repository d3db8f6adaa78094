import time

import pytest
import torch

from callbacks.measure.timing import Budget, BudgetBar, time_calls

CPU = torch.device("cpu")


def test_warm_up_is_not_timed_and_the_median_is_of_the_repeats():
    durations = iter([0.05, 0.05, 0.002, 0.002, 0.002, 0.03])
    timing = time_calls(lambda: time.sleep(next(durations)), CPU, Budget(warmup=2, repeats=4, seconds=5))
    assert timing.repeats == 4
    assert 0.002 <= timing.p10 <= timing.median < 0.012
    assert 0.015 < timing.p90 < 0.06


def test_the_budget_ends_the_repeats():
    start = time.perf_counter()
    timing = time_calls(lambda: time.sleep(0.02), CPU, Budget(warmup=50, repeats=1000, seconds=0.2))
    assert 1 <= timing.repeats <= 10
    assert time.perf_counter() - start < 0.4


def test_one_call_of_each_kind_is_always_made():
    calls = []
    timing = time_calls(
        lambda: calls.append(time.sleep(0.01)), CPU, Budget(warmup=3, repeats=3, seconds=1e-6)
    )
    assert (len(calls), timing.repeats) == (2, 1)
    assert timing.p10 == timing.median == timing.p90 == pytest.approx(0.01, abs=0.01)


def test_the_bar_shows_itself_only_after_a_second(capsys):
    with BudgetBar("timing", seconds=9) as bar:
        bar()
        assert capsys.readouterr().err == ""
        time.sleep(1.1)
        bar()
        assert "timing" in (shown := capsys.readouterr().err)
        assert "of at most 9.0 s" in shown
