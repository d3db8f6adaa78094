"""Time of one rank-gradient sweep over the 53 conv layers of ResNet-50: full SVD, Gram matrices, and ours.

    python benchmarks/speed.py rpg [--threads 1] [--repeats 3] [--spectrum flat|decaying|direction|sparse]

All variants run in turn in every repeat, on the same weights. Each gives the gradient of the mean rank loss
at every weight; its error is measured against double precision. Also measured: a topology update without the
rank loss, and a training step, so that the share of the training time at the published interval of 100 steps
can be read off. Wall time is what a user waits; CPU time is less disturbed by other people's jobs.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import cpu_and_wall, turns, write_numbers
from torch import Tensor, nn
from torchvision.models import resnet50

from callbacks.pruning.criteria import global_magnitude_masks
from callbacks.pruning.growth import move_weights
from callbacks.pruning.masks import MaskBook
from callbacks.pruning.rank_loss import as_matrix, choose_rank, exact_truncation
from callbacks.pruning.rank_sweep import RankSweep, add_rank_gradients

Tensors = dict[str, Tensor]
PUBLISHED_INTERVAL = 100


def shaped(weight: Tensor, spectrum: str) -> Tensor:
    """A weight with the given kind of singular values: as initialised, 1/sqrt(i), one large one, or 2 %
    dense.
    """
    if spectrum == "flat":
        return weight
    if spectrum == "sparse":
        return weight * (torch.rand_like(weight) < 0.02)
    left, values, right = torch.linalg.svd(as_matrix(weight), full_matrices=False)
    if spectrum == "decaying":
        values = torch.arange(1, len(values) + 1) ** -0.5
    else:
        values[0] = 0.7 * values.norm()
    return ((left * values) @ right).view_as(weight)


def full_svd(weights: Tensors, gradients: Tensors, tolerance: float) -> None:
    """As the reference: a full SVD of the unit-norm matrix, then T = Y - A and the closed-form gradient."""
    for name, weight in weights.items():
        matrix = as_matrix(weight)
        norm = matrix.norm()
        unit = matrix / norm
        left, values, right = torch.linalg.svd(unit, full_matrices=False)
        rank, _ = choose_rank(values.square(), tolerance)
        rest = unit - (left[:, :rank] * values[:rank]) @ right[:rank]
        gradient = (-2 / norm / len(weights)) * (rest - rest.square().sum() * unit)
        gradients[name].add_(gradient.view_as(weight))


def double_gram(weights: Tensors, gradients: Tensors, tolerance: float) -> None:
    """Every layer's smaller Gram matrix and its eigenvectors in double precision."""
    truncations = {}
    for name, weight in weights.items():
        truncation = exact_truncation(as_matrix(weight), tolerance)
        assert truncation is not None
        truncations[name] = truncation
    add_rank_gradients(truncations, weights, gradients, 1.0)


def single_gram(weights: Tensors, gradients: Tensors, tolerance: float) -> None:
    """In single precision whatever the error, but for small layers and an undecided k."""
    add_rank_gradients(RankSweep(tolerance, max_error=math.inf)(weights), weights, gradients, 1.0)


def ours(weights: Tensors, gradients: Tensors, tolerance: float) -> None:
    add_rank_gradients(RankSweep(tolerance)(weights), weights, gradients, 1.0)


def errors(weights: Tensors, gradients: Tensors, tolerance: float) -> tuple[float, float]:
    """Largest relative error of a layer's gradient: in the Frobenius norm, and of the largest entry."""
    worst = [0.0, 0.0]
    for name, weight in weights.items():
        matrix = as_matrix(weight).double()
        truncation = exact_truncation(matrix, tolerance)
        exact = truncation.add_gradient(matrix, torch.zeros_like(matrix), 1 / len(weights))
        difference = as_matrix(gradients[name]).double() - exact
        worst[0] = max(worst[0], float(difference.norm() / exact.norm()))
        worst[1] = max(worst[1], float(difference.abs().max() / exact.abs().max()))
    return worst[0], worst[1]


def timed(call: Callable[[], object]) -> np.ndarray:
    """Seconds of CPU and of wall time."""
    start = cpu_and_wall()
    call()
    return cpu_and_wall() - start


def measure_sweeps(options: argparse.Namespace, weights: Tensors) -> dict[str, dict[str, float]]:
    sweeps: dict[str, Callable[[Tensors, Tensors, float], None]] = {
        "full SVD": full_svd,
        "Gram, double": double_gram,
        "Gram, single": single_gram,
        "ours": ours,
    }
    if options.skip_svd:
        del sweeps["full SVD"]
    times: dict[str, list[np.ndarray]] = {name: [] for name in sweeps}
    rows: dict[str, dict[str, float]] = {}
    for name in turns(list(sweeps), options.repeats):
        gradients = {key: torch.zeros_like(weight) for key, weight in weights.items()}
        times[name].append(timed(partial(sweeps[name], weights, gradients, options.tolerance)))
        if name not in rows:
            norm, entry = errors(weights, gradients, options.tolerance)
            rows[name] = {"error_norm": norm, "error_entry": entry}
    for name, pairs in times.items():
        rows[name]["seconds"] = float(np.median([wall for _, wall in pairs]))
        rows[name]["cpu_seconds"] = float(np.median([cpu for cpu, _ in pairs]))
    return rows


def measure_update(network: nn.Module, repeats: int) -> float:
    """Median wall time of a global cut with regrowth over all 54 tensors, at density 0.1."""
    weights = {name: weight.detach() for name, weight in network.named_parameters() if weight.ndim > 1}
    gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def update() -> None:
        masks = MaskBook(weights)
        for name, mask in global_magnitude_masks(weights, 0.1).items():
            masks[name] = mask
        move_weights(masks, weights, gradients, 0.15)

    return statistics.median(float(timed(update)[1]) for _ in range(repeats))


def measure_step(network: nn.Module, batch: int, repeats: int) -> float:
    """Median wall time of a forward and backward pass with SGD on 224 x 224 images."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    step()
    return statistics.median(float(timed(step)[1]) for _ in range(repeats))


def report(
    options: argparse.Namespace, rows: dict[str, dict[str, float]], step: float, update: float
) -> None:
    print(
        f"ResNet-50, 53 conv layers, spectrum {options.spectrum}, tolerance {options.tolerance}, "
        f"{torch.get_num_threads()} threads, {options.repeats} repeats (medians)"
    )
    print(f"{'':14} {'wall s':>8} {'CPU s':>8} {'x wall':>7} {'x CPU':>7} {'err norm':>9} {'err entry':>9}")
    base = rows.get("full SVD")
    for name, row in rows.items():
        ratios = [f"{base[key] / row[key]:7.1f}" if base else " " * 7 for key in ("seconds", "cpu_seconds")]
        print(
            f"{name:14} {row['seconds']:8.3f} {row['cpu_seconds']:8.3f} {ratios[0]} {ratios[1]} "
            f"{row['error_norm']:9.1e} {row['error_entry']:9.1e}"
        )
    print(f"{'topology update without the rank loss':40} {update:8.3f} s")
    if step:
        share = rows["ours"]["seconds"] / (PUBLISHED_INTERVAL * step)
        print(f"{f'training step, batch {options.batch}':40} {step:8.3f} s")
        print(
            f"{f'sweep every {PUBLISHED_INTERVAL} such steps':40} {100 * share:8.3f} % of the training time"
        )
        print(f"{'update, in such steps':40} {update / step:8.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.2, help="the paper's delta")
    parser.add_argument("--spectrum", choices=["flat", "decaying", "direction", "sparse"], default="flat")
    parser.add_argument(
        "--batch", type=int, default=16, help="of the training step; 0 skips it (published: 128)"
    )
    parser.add_argument("--skip-svd", action="store_true", help="leave out the slow baseline")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = resnet50()
    weights = {
        name: shaped(module.weight.detach(), options.spectrum)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    ours(weights, {name: torch.zeros_like(weight) for name, weight in weights.items()}, options.tolerance)
    rows = measure_sweeps(options, weights)
    step = measure_step(network, options.batch, options.repeats) if options.batch else 0.0
    update = measure_update(network, options.repeats)
    report(options, rows, step, update)
    numbers = {"sweeps": rows, "step_seconds": step, "update_seconds": update, "threads": options.threads}
    write_numbers(options.json, numbers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
