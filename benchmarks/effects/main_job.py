"""The main job on real images: a ViT alone, distilled from a ResNet, pruned, and both; three seeds.

    python benchmarks/effects/main_job.py --data cifar10_subset.tar.gz

All students see the same 10,000 photographs for the same number of steps. Pruned: gradual magnitude pruning
of all conv and linear weights to 80 % zeros.
"""

from functools import partial
from pathlib import Path
from typing import Any

from cifar10 import STUDENT, options, prepare, teacher
from harness import fit_and_test, spread, sweep, table, top1

CALLBACKS = Path(__file__).parents[2] / "configs" / "callbacks"


def plug_ins(checkpoint: Path) -> dict[str, list[str]]:
    """Command-line options of each variant."""
    kd = [f"--trainer.callbacks+={CALLBACKS / 'kd.yaml'}", "--trainer.callbacks.teacher", "null"]
    kd += ["--trainer.callbacks.weights", str(checkpoint)]
    pruning = [f"--trainer.callbacks+={CALLBACKS / 'magnitude_pruning.yaml'}"]
    pruning += ["--trainer.callbacks.target_sparsity", "0.8"]
    return {"none": [], "kd": kd, "pruned": pruning, "kd_pruned": kd + pruning}


def student(plugged: list[str], root: Path, seed: int, directory: Path) -> dict[str, Any]:
    """Train and test one student."""
    recipe = ["--config", str(STUDENT), "--data.init_args.root", str(root)]
    report = [f"--trainer.callbacks+={CALLBACKS / 'efficiency.yaml'}", "--trainer.callbacks.latency", "false"]
    return fit_and_test([*recipe, *plugged], [*recipe, *report], directory, seed)


def main() -> None:
    chosen = options(__doc__).parse_args()
    whole, small = prepare(chosen.data, chosen.runs)
    checkpoint = teacher(whole, chosen.runs)
    variants = {name: partial(student, plugged, small) for name, plugged in plug_ins(checkpoint).items()}
    results = sweep(variants, chosen.seeds, chosen.runs, chosen.jobs)
    rows = [
        [
            name,
            spread([top1(report) for report in reports], 100),
            spread([100 * report["efficiency"]["sparsity"] for report in reports]),
            f"{reports[0]['efficiency']['weights_nonzero'] / 1e3:.0f} k",
        ]
        for name, reports in results.items()
    ]
    print(table(["student", "test top-1, %", "zeros among the weights, %", "non-zero weights"], rows))


if __name__ == "__main__":
    main()
