"""RPG against gradual magnitude pruning and RigL at the same sparsity, from the same dense networks, same
budget.

    python benchmarks/effects/rpg.py --data cifar10_subset.tar.gz

Each network starts from a dense ResNet of the same seed, and trains 6 epochs at a tenth of its rate. With
`--weights 10 100` only RPG is run, once for each of these rank weights.
"""

from functools import partial
from pathlib import Path
from typing import Any

from cifar10 import RESNET, options, prepare
from harness import fit_and_test, spread, sweep, table, top1
from main_job import CALLBACKS

UPDATES = ["--trainer.callbacks.update_every", "20"]
SCHEDULE = ["--trainer.callbacks.prune_end", "0.7"]


def plug_in(method: str, sparsity: float, rank_weight: float) -> list[str]:
    """Command-line options of a method."""
    file = {"gradual magnitude": "magnitude_pruning", "RigL": "rigl"}.get(method, "rpg")
    chosen = [
        f"--trainer.callbacks+={CALLBACKS / file}.yaml",
        "--trainer.callbacks.target_sparsity",
        str(sparsity),
    ]
    if method == "gradual magnitude":
        return [*chosen, *UPDATES, *SCHEDULE]
    chosen += [*UPDATES, "--trainer.callbacks.topology_end", "0.75"]
    if method == "RigL":
        return [*chosen, "--trainer.callbacks.initial_masks", "magnitude"]
    chosen += [
        *SCHEDULE,
        "--trainer.callbacks.rank_weight",
        str(rank_weight),
        "--trainer.callbacks.schedule",
        "cubic",
    ]
    apply = "growth_only" if "growth_only" in method else "step"
    return [*chosen, "--trainer.callbacks.rank_tolerance", "0.1", "--trainer.callbacks.apply", apply]


def prune(plugged: list[str], root: Path, runs: Path, seed: int, directory: Path) -> dict[str, Any]:
    """Prune the dense student of this seed, and test what is left."""
    dense = runs / f"dense-{seed}"
    recipe = ["--config", str(RESNET), "--data.init_args.root", str(root)]
    fit_and_test(recipe, recipe, dense, seed)
    start = ["--model.init_args.weights", str(dense / "checkpoints" / "last.ckpt")]
    start += ["--model.init_args.optimizer.lr", "0.01", "--trainer.max_epochs", "6"]
    return fit_and_test([*recipe, *start, *plugged], [*recipe, *plugged], directory, seed)


def ranks(report: dict[str, Any]) -> float:
    """Mean delta-rank (delta = 0.1) of the conv layers, as a share of the full rank."""
    return float(report["pruning"]["mean_delta_rank"])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.95, 0.98])
    parser.add_argument("--rank-weight", type=float, default=0.5)
    parser.add_argument("--weights", type=float, nargs="*", default=[], help="rank weights to try")
    chosen = parser.parse_args()
    _, small = prepare(chosen.data, chosen.runs)
    methods = ("gradual magnitude", "RigL", "RPG", "RPG growth_only")
    variants = {
        f"{method} {sparsity:g}".replace(" ", "-"): partial(
            prune, plug_in(method, sparsity, chosen.rank_weight), small, chosen.runs
        )
        for sparsity in chosen.sparsities
        for method in methods
    }
    if chosen.weights:
        variants = {
            f"RPG-{sparsity:g}-weight-{weight:g}": partial(
                prune, plug_in("RPG", sparsity, weight), small, chosen.runs
            )
            for sparsity in chosen.sparsities
            for weight in chosen.weights
        }
    results = sweep(variants, chosen.seeds, chosen.runs, chosen.jobs)
    rows = [
        [
            name,
            spread([top1(report) for report in reports], 100),
            spread([100 * report["pruning"]["sparsity"] for report in reports]),
            spread([ranks(report) for report in reports], digits=1),
        ]
        for name, reports in results.items()
    ]
    print(table(["method and sparsity", "test top-1, %", "zeros, %", "mean delta-rank"], rows))


if __name__ == "__main__":
    main()
