"""Throughput of a ViT with PPT, and with ToMe at equal MACs, against the unreduced one: ratios from
interleaved runs.

Random weights: the cost does not depend on them, PPT lays out both ways for every image. On the CPU one
thread and process CPU time, which other people's jobs disturb least (wall time stands beside it); on a GPU
wall time between synchronisations, eager and as a captured CUDA graph.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from common import (
    cpu_and_wall,
    forget_peak,
    in_own_process,
    interleaved,
    peak_mebibytes,
    status_mebibytes,
    write_numbers,
)
from torch import Tensor, nn

from callbacks.token_reduction import MergeSimilar, PruneOrPool, Reducer, VitShape, attach_reducers

Rules = dict[int, Reducer]
Times = dict[str, list[np.ndarray]]  # seconds of (CPU, wall) a call


def tome_at(shape: VitShape, macs: int) -> Rules:
    """ToMe in every block with just not more than `macs`: r or r + 1 tokens a block, the larger ones
    first.
    """

    def rules(total: int) -> Rules:
        r, more = divmod(total, shape.depth)
        return {block: MergeSimilar(r + (block < more)) for block in range(shape.depth)}

    return next(rules(total) for total in range(shape.tokens) if shape.macs(rules(total)) <= macs)


def variants(shape: VitShape, blocks: list[int], r: int, policies: bool) -> dict[str, Rules]:
    ppt: Rules = {block: PruneOrPool(r) for block in blocks}
    rules = {"dense": {}, "PPT": ppt, "ToMe": tome_at(shape, shape.macs(ppt))}
    if policies:
        rules["PPT, prune only"] = {block: PruneOrPool(r, policy="prune") for block in blocks}
        rules["PPT, pool only"] = {block: PruneOrPool(r, policy="pool") for block in blocks}
    return rules


def reduced(dense: nn.Module, rules: Rules) -> nn.Module:
    network = copy.deepcopy(dense)
    if rules:
        attach_reducers(network, rules)
    return network


def captured(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """The forward pass as a CUDA graph: no launch costs, which is what small batches on a GPU consist of."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(images)
    return graph.replay


def peak_megabytes(arguments: argparse.Namespace, name: str, batch: int) -> float:
    """Memory that one forward pass needs beyond the loaded network, in a process of its own."""
    options = (
        f"--batches {batch} --model {arguments.model} --r {arguments.r} --device {arguments.device} --blocks"
    )
    line = ["--memory-of", name, *options.split(), *arguments.blocks]
    return float(in_own_process(__file__, *line, own_pages=True))


def measure_memory(network: nn.Module, images: Tensor) -> float:
    network(images[:1])  # what libraries set up once
    forget_peak()
    used = torch.cuda.memory_allocated() / 2**20 if images.is_cuda else status_mebibytes("VmRSS")
    network(images)
    return peak_mebibytes() - used


def report(times: Times, macs: dict[str, int], batch: int, what: str) -> list[dict]:
    clock = 0 if what == "cpu" else 1  # CPU time on the CPU, wall time on a GPU
    rows = []
    print(f"\nbatch {batch}, {what}, {len(times['dense'])} interleaved repetitions")
    heads = ("GMACs", "MAC ratio", "min ms", "median ms", "by min", "by median", "wall")
    print(f"{'':<16}" + "".join(f"{head:>11}" for head in heads))
    for name in times:
        least, median = (
            {n: float(f(t[clock] for t in ts)) for n, ts in times.items()} for f in (min, statistics.median)
        )
        wall = {n: float(statistics.median(t[1] for t in ts)) for n, ts in times.items()}
        row = {
            "batch": batch,
            "what": what,
            "name": name,
            "macs": macs[name],
            "mac_ratio": macs["dense"] / macs[name],
            "min_seconds": least[name],
            "median_seconds": median[name],
            "ratio_by_min": least["dense"] / least[name],
            "ratio_by_median": median["dense"] / median[name],
            "wall_ratio_by_median": wall["dense"] / wall[name],
            "repeats": len(times[name]),
        }
        rows.append(row)
        cells = [f"{macs[name] / 1e9:.3f}", f"{row['mac_ratio']:.3f}"]
        cells += [f"{1e3 * seconds:.1f}" for seconds in (least[name], median[name])]
        cells += [f"{row[key]:.3f}" for key in ("ratio_by_min", "ratio_by_median", "wall_ratio_by_median")]
        print(f"{name:<16}" + "".join(f"{cell:>11}" for cell in cells))
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--r", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=9, help="rounds; three times as many at batch 1")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="most time for the rounds of one batch size"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--policies", action="store_true", help="also prune in every image, and pool in every image"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.inference_mode()
def main() -> int:
    arguments = parsed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    dense = timm.create_model(arguments.model).eval().to(device)
    shape = VitShape.of(dense)
    rules = variants(shape, arguments.blocks, arguments.r, arguments.policies)
    side = dense.patch_embed.img_size
    if arguments.memory_of:
        images = torch.randn(arguments.batches[0], 3, *side, device=device)
        print(measure_memory(reduced(dense, rules[arguments.memory_of]), images))
        return 0
    macs = {name: shape.macs(rule) for name, rule in rules.items()}
    networks = {name: reduced(dense, rule) for name, rule in rules.items()}
    rows = []
    for batch in arguments.batches:
        images = torch.randn(batch, 3, *side, device=device)
        repeats = arguments.repeats * (3 if batch == 1 else 1)
        calls = {name: partial(network, images) for name, network in networks.items()}
        times = interleaved(calls, repeats, cpu_and_wall, arguments.seconds)
        rows += report(times, macs, batch, device.type)
        if device.type == "cuda":
            graphs = {name: captured(network, images) for name, network in networks.items()}
            times = interleaved(graphs, repeats, cpu_and_wall, arguments.seconds)
            rows += report(times, macs, batch, "cuda graph")
    if not arguments.no_memory:
        batch = max(arguments.batches)
        memory = {name: peak_megabytes(arguments, name, batch) for name in ("dense", "PPT", "ToMe")}
        print(
            f"\npeak memory of a forward pass beside the weights, batch {batch}: "
            + ", ".join(f"{n} {m:.0f} MiB" for n, m in memory.items())
        )
        rows.append({"batch": batch, "what": "memory_mebibytes", **memory})
    write_numbers(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
