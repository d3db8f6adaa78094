"""What every effect experiment shares: variants x seeds through the real command, and one table at the end.

A finished run is recognised by its `results.json` and not repeated, so an interrupted experiment goes on
where it was.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Results = dict[str, list[dict[str, Any]]]


def featherlight(command: str, arguments: Sequence[str], directory: Path, threads: int = 1) -> None:
    """One `featherlight` command in a process of its own; its output goes to `<directory>/<command>.log`.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        arguments: the rest of the command line.
        directory: the run's directory.
        threads: OpenMP threads of the process.

    Raises:
        SystemExit: the command failed; prints the end of its log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "featherlight", command, *arguments]
    line += ["--trainer.default_root_dir", str(directory), "--trainer.enable_progress_bar", "false"]
    log = directory / f"{command}.log"
    with open(log, "w") as file:
        file.write(" ".join(line) + "\n")
        file.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        status = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"{directory}: featherlight {command} failed with status {status}:\n{tail}")


def fit_and_test(
    fit_arguments: Sequence[str], test_arguments: Sequence[str], directory: Path, seed: int
) -> dict[str, Any]:
    """Train, then test the last checkpoint; the contents of `results.json`.

    Args:
        fit_arguments: of `fit`.
        test_arguments: of `test`.
        directory: the run's directory.
        seed: of both.
    """
    report = directory / "results.json"
    if not report.exists():
        seeded = ["--seed_everything", str(seed)]
        featherlight("fit", [*fit_arguments, *seeded, "--ckpt_path", "auto"], directory)
        featherlight("test", [*test_arguments, *seeded, "--ckpt_path", "auto"], directory)
    print(f"  done: {directory}", flush=True)
    return json.loads(report.read_text())


def sweep(
    variants: Mapping[str, Callable[[int, Path], dict[str, Any]]],
    seeds: Sequence[int],
    directory: Path,
    jobs: int = 2,
) -> Results:
    """Every variant with every seed, `jobs` at a time.

    Args:
        variants: `{name: function of (seed, run directory) that gives a results.json}`.
        seeds: one run each.
        directory: of the experiment.
        jobs: processes side by side, one thread each.
    """
    tasks = [(name, seed) for seed in seeds for name in variants]
    with ThreadPoolExecutor(jobs) as pool:
        found = list(
            pool.map(lambda task: variants[task[0]](task[1], directory / f"{task[0]}-{task[1]}"), tasks)
        )
    results: Results = {name: [] for name in variants}
    for (name, _), report in zip(tasks, found, strict=True):
        results[name].append(report)
    return results


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """`mean (smallest-largest)` of some runs."""
    scaled = [scale * value for value in values]
    low, mean, high = min(scaled), statistics.mean(scaled), max(scaled)
    return f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def top1(report: Mapping[str, Any]) -> float:
    """Test accuracy of a run, a fraction."""
    return float(report["metrics"]["test/top1"])
