"""Distillation on real images: a student alone, with KD, DKD, FitNet and OFA; three seeds.

    python benchmarks/effects/ofakd.py --data cifar10_subset.tar.gz
    python benchmarks/effects/ofakd.py --data cifar10_subset.tar.gz --sweep

A small ViT learns 10,000 photographs from a ResNet that was trained on 30,000 first: two families, the same
photographs and the same number of steps for every variant, every criterion as its file in configs/callbacks/
has it. `--sweep` varies gamma and ofa_weight of OFA instead, on two seeds. The runs `none` and `kd` are those
of main_job.py.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from cifar10 import options, prepare, teacher
from harness import Results, spread, sweep, table, top1
from main_job import CALLBACKS, plug_ins, student

CRITERIA = ("dkd", "fitnet", "ofa")
GAMMAS = (1.0, 1.2, 1.4)
OFA_WEIGHTS = (0.1, 0.3, 1.0)
SWEEP_SEEDS = 2
SMOKE_IMAGES = 16
SMOKE = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


def distilled(criterion: str, checkpoint: Path) -> list[str]:
    """Command-line options that plug in a criterion's drop-in file with our teacher."""
    own = ["--trainer.callbacks.teacher", "null", "--trainer.callbacks.weights", str(checkpoint)]
    return [f"--trainer.callbacks+={CALLBACKS / f'{criterion}.yaml'}", *own]


def criteria(checkpoint: Path) -> dict[str, list[str]]:
    """Options of the variants, in the order of the table."""
    shared = {name: plug_ins(checkpoint)[name] for name in ("none", "kd")}
    return {**shared, **{name: distilled(name, checkpoint) for name in CRITERIA}}


def place(gamma: float, weight: float) -> str:
    """Name of a variant of OFA; the drop-in's own values are the variant `ofa`."""
    return "ofa" if (gamma, weight) == (1.0, 1.0) else f"ofa_gamma{gamma}_weight{weight}"


def grid(checkpoint: Path) -> dict[str, list[str]]:
    """Options of OFA with every gamma and ofa_weight."""
    return {
        place(gamma, weight): [
            *distilled("ofa", checkpoint),
            *("--trainer.callbacks.criterion.gamma", str(gamma)),
            *("--trainer.callbacks.criterion.ofa_weight", str(weight)),
        ]
        for gamma, weight in product(GAMMAS, OFA_WEIGHTS)
    }


def comparison(results: Results) -> str:
    """The criteria side by side, each also as the mean difference to the student alone with the same seed."""
    alone = [top1(report) for report in results["none"]]
    rows = []
    for name, reports in results.items():
        accuracies = [top1(report) for report in reports]
        gains = [a - b for a, b in zip(accuracies, alone, strict=True)]
        rows.append([name, spread(accuracies, 100), spread(gains, 100)])
    return table(["criterion", "test top-1, %", "over none, points"], rows)


def sweep_table(results: Results) -> str:
    """Gamma downwards, ofa_weight to the right."""
    rows = [
        [
            str(gamma),
            *(spread([top1(r) for r in results[place(gamma, weight)]], 100) for weight in OFA_WEIGHTS),
        ]
        for gamma in GAMMAS
    ]
    return table(["test top-1, %; gamma", *(f"ofa_weight {weight}" for weight in OFA_WEIGHTS)], rows)


def commands(names: Iterable[str], seed: int, runs: Path) -> str:
    """The command line that trained each variant, as the run's log has it."""
    logs = [(runs / f"{name}-{seed}" / "fit.log").read_text() for name in names]
    return "\n".join("featherlight fit" + re.split(r"featherlight fit|\n", log)[1] for log in logs)


def runs_of(plugged: Mapping[str, list[str]], root: Path) -> dict[str, Callable[[int, Path], dict[str, Any]]]:
    return {name: partial(student, arguments, root) for name, arguments in plugged.items()}


def parsed() -> argparse.Namespace:
    parser = options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sweep", action="store_true", help=f"gamma x ofa_weight on {SWEEP_SEEDS} seeds")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything, in <runs>/smoke")
    return parser.parse_args()


def main() -> None:
    chosen = parsed()
    runs = chosen.runs / "smoke" if chosen.smoke else chosen.runs
    whole, small = prepare(chosen.data, runs, SMOKE_IMAGES) if chosen.smoke else prepare(chosen.data, runs)
    checkpoint = teacher(small if chosen.smoke else whole, runs)
    plugged = grid(checkpoint) if chosen.sweep else criteria(checkpoint)
    if chosen.smoke:
        plugged = {name: [*arguments, *SMOKE] for name, arguments in plugged.items()}
    seeds = chosen.seeds[: 1 if chosen.smoke else SWEEP_SEEDS if chosen.sweep else None]
    results = sweep(runs_of(plugged, small), seeds, runs, chosen.jobs)
    print(f"\nseeds {', '.join(map(str, seeds))}; mean (smallest-largest)\n")
    print(sweep_table(results) if chosen.sweep else comparison(results))
    taught = json.loads((runs / "teacher" / "results.json").read_text())
    print(f"\nThe teacher has {100 * top1(taught):.2f} %. Trained by\n")
    print(commands(results, seeds[0], runs))


if __name__ == "__main__":
    main()
