"""Seconds and peak memory of CBQ, window by window, against a straightforward implementation in the same run.

    python benchmarks/speed.py cbq [--hidden 576] [--blocks 4] [--segments 16] [--length 256] [--epochs 1]
    python benchmarks/speed.py cbq --model SmolLM2-135M-Instruct.Q4_1.gguf --blocks 30
    python benchmarks/speed.py cbq --peers --help       beside AutoRound and llm-compressor

The straightforward implementation is what one writes first: a full rounding matrix for every weight of every
block from the start, soft rounding spelled out in autograd, no caches (each step runs the embedding, the
quantized prefix and both full-precision branches again, from the tokens). Ours: rank 5 (as published) or full
rounding matrices, cached targets, one fused fake-quantizer a layer, learned state for the blocks of a window
only. Both do the same windows, the same number of steps and batches; each variant runs in a process of its
own, so that its peak memory is its own.

Without `--model` the model is a random Llama with the shape of SmolLM2-135M's blocks and a small vocabulary.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import quantizer_peers
import torch
from common import in_own_process, turns, write_numbers
from torch import Tensor, nn

from callbacks.measure.memory import PeakMemory
from callbacks.quantization import CrossBlock, CrossBlockSettings, Scheme, resolve_schemes
from callbacks.quantization.blocks import BlockStack, find_blocks, linear_layers
from callbacks.quantization.grid import fit_grid
from callbacks.quantization.layers import replace_module
from callbacks.quantization.losses import reconstruction_loss
from callbacks.quantization.rounding import rect, rect_inverse
from callbacks.quantization.windows import sliding_windows
from lightning_modules.language_model import build_language_model, load_language_model

VARIANTS = ("straightforward", "ours, rank 5", "ours, full rounding")


class PlainLayer(nn.Module):
    """A linear layer with a soft rounding matrix, written as the formula reads."""

    def __init__(self, layer: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.layer, self.active = layer, False
        grid = fit_grid(layer.weight.detach(), scheme.bits, scheme.group_size)
        self.repeat = layer.in_features // grid.scale.shape[1]
        scaled = layer.weight.detach() / self.wide(grid.scale)
        self.base, self.zero, self.high = scaled.floor(), self.wide(grid.zero_point), grid.high
        self.v = nn.Parameter(rect_inverse(scaled - self.base))
        self.scale = nn.Parameter(grid.scale.clone())

    def wide(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.repeat, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.layer(x)
        soft = (self.base + rect(self.v) + self.zero).clamp(0, self.high)
        hard = (self.base + (self.v >= 0) + self.zero).clamp(0, self.high)
        integers = soft + (hard - soft).detach()
        return nn.functional.linear(x, (integers - self.zero) * self.wide(self.scale), self.layer.bias)


def straightforward(
    network: nn.Module, segments: Tensor, settings: CrossBlockSettings, scheme: Scheme
) -> list[dict[str, float]]:
    """Every window without caches and with full matrices everywhere; seconds and memory of each."""
    network.eval().requires_grad_(False)
    path, blocks = find_blocks(network)
    stack = BlockStack(network, path, segments[:1], torch.device("cpu"))
    layers: dict[str, PlainLayer] = {}
    for name, layer in linear_layers(network, path).items():
        layers[name] = PlainLayer(layer, scheme)  # type: ignore[arg-type]
        replace_module(network, name, layers[name])
    rows = []

    def run(start: int, end: int, hidden: Tensor, active: bool) -> Tensor:
        for layer in layers.values():
            layer.active = active
        return stack.run(start, end, hidden)

    for start, end in sliding_windows(len(blocks), settings.window, settings.overlap):
        began, memory = time.perf_counter(), PeakMemory(torch.device("cpu"))
        learned = [layer for name, layer in layers.items() if start <= int(name.split(".")[2]) < end]
        optimizer = torch.optim.Adam(
            [
                {"params": [layer.v for layer in learned], "lr": settings.lr_rounding},
                {"params": [layer.scale for layer in learned], "lr": settings.lr_weight_step},
            ]
        )
        for _ in range(settings.epochs):
            for places in torch.randperm(len(segments)).split(settings.batch_size):
                with torch.no_grad():
                    hidden = stack.embed(segments[places])
                    target = run(0, end, hidden, active=False)
                    prefix = run(0, start, hidden, active=True)
                    homologous = run(start, end, prefix, active=False)
                loss = reconstruction_loss(target, homologous, run(start, end, prefix, active=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        rows.append({"seconds": time.perf_counter() - began, "peak_memory_bytes": memory.stop()})
    return rows


def ours(
    network: nn.Module, segments: Tensor, settings: CrossBlockSettings, scheme: Scheme
) -> list[dict[str, Any]]:
    path, blocks = find_blocks(network)
    schemes = resolve_schemes(linear_layers(network, path), scheme)
    windows = sliding_windows(len(blocks), settings.window, settings.overlap)
    engine = CrossBlock(network, path, windows, schemes, segments, settings, report_segments=1)
    return engine.run().rows


def make_network(options: argparse.Namespace) -> nn.Module:
    if options.model:
        network = load_language_model(options.model)
        del network.model.layers[options.blocks :]  # type: ignore[union-attr]
        network.config.num_hidden_layers = options.blocks  # type: ignore[union-attr]
        return network
    heads = options.hidden // 64
    shape = {
        "hidden_size": options.hidden,
        "intermediate_size": 64 * round(options.hidden / 24),  # 8/3, in whole groups
        "num_hidden_layers": options.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 or 1,
        "max_position_embeddings": options.length,
    }
    torch.manual_seed(0)
    return build_language_model("llama", shape, 1024)


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process."""
    torch.set_num_threads(options.threads)
    network = make_network(options)
    segments = torch.randint(0, 1000, (options.segments, options.length))
    settings = CrossBlockSettings(
        epochs=options.epochs,
        batch_size=options.batch,
        rounding_rank="full" if variant == "ours, full rounding" else 5,
        cfp_weights=False,
        cfp_activations=False,
    )
    began = time.perf_counter()
    method = straightforward if variant == "straightforward" else ours
    rows = method(network, segments, settings, Scheme(options.bits, 64))
    steps = options.epochs * math.ceil(options.segments / options.batch)
    return {
        "total_seconds": time.perf_counter() - began,
        "windows": len(rows),
        "steps": steps,
        "first_window_seconds": rows[0]["seconds"],
        "last_window_seconds": rows[-1]["seconds"],
        "window_seconds": statistics.mean(row["seconds"] for row in rows),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """A line a variant: medians over the repeats, and the ratio to the straightforward implementation."""
    lines = [f"{'':20} {'s a window':>10} {'first':>7} {'last':>7} {'total s':>8} {'x':>6} {'peak MB':>8}"]
    base = statistics.median(run["total_seconds"] for run in found["straightforward"])
    for name, runs in found.items():
        values = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"{name:20} {values['window_seconds']:10.2f} {values['first_window_seconds']:7.2f} "
            f"{values['last_window_seconds']:7.2f} {values['total_seconds']:8.1f} "
            f"{base / values['total_seconds']:6.2f} {values['peak_memory_bytes'] / 1e6:8.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    if "--peers" in sys.argv:
        sys.argv.remove("--peers")
        return quantizer_peers.main()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="GGUF file or folder; its first blocks are used")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for name in turns(list(VARIANTS), options.repeats):
        found[name].append(json.loads(in_own_process(__file__, *sys.argv[1:], "--only", name)))
    steps = found["straightforward"][0]["steps"]
    print(f"{options.blocks} blocks, {steps} steps a window, {options.repeats} repeats (medians)")
    print(report(found))
    write_numbers(options.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
