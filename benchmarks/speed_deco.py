"""DECO in inference: its deployed form against its training form, and DECO R50 against DETR-R50 as it is.

Everything of a table is measured in one run, interleaved: each round times every network once and begins with
another one; a ratio is the median of the rounds' own ratios. Weights are random and images noise: the cost
depends on neither. On the CPU with one thread the time is the process's own (CPU time), which other people's
jobs disturb least; else wall time. DETR is that of transformers;
no hub is asked. On a GPU each network is also timed compiled, as a CUDA graph.
"""

import argparse
import contextlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    clock,
    forget_peak,
    in_own_process,
    interleaved,
    markdown,
    peak_mebibytes,
    ratios,
    write_numbers,
)
from torch import Tensor, nn

from lightning_modules.deco import Deco, DecoPlus, deploy

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deco-r50": Deco,
    "deco-convnext-t": partial(Deco, backbone="convnext_tiny"),
    "decoplus-r18": partial(DecoPlus, depth=18),
    "decoplus-r50": partial(DecoPlus, depth=50),
}
FORMS = ("training", "deployed")
Seconds = dict[str, list[float]]


class DetrR50(nn.Module):
    """transformers' DETR-R50 with the forward pass of ours."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

        config = DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=ResNetConfig(out_features=["stage4"]),
            num_labels=91,
        )
        self.detr = DetrForObjectDetection(config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As of `DetectionNetwork`."""
        found = self.detr(pixel_values=images)
        return {"logits": found.logits, "boxes": found.pred_boxes}


def build(name: str, form: str) -> nn.Module:
    """A network with random weights in one of its forms.

    Args:
        name: of `NETWORKS`, or `detr-r50`.
        form: `training` (its eval mode as it is trained, all heads), or `deployed`.
    """
    torch.manual_seed(0)
    network = (DetrR50 if name == "detr-r50" else NETWORKS[name])().eval()
    shake(network)
    return network if form == "training" or name == "detr-r50" else deploy(network)


@torch.no_grad()
def shake(network: nn.Module) -> None:
    """Make layer scales and box heads count: they begin at almost nothing, which would hide wrong folding."""
    for name, parameter in network.named_parameters():
        if "gamma" in name:
            parameter.fill_(0.1)
        elif parameter.ndim > 1 and not parameter.any():
            parameter.normal_(0, 0.01)


def difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Largest absolute difference of logits and boxes.

    DECO+ goes on with the queries that `one` selects: with random weights the best 300 of 8,400 scores lie so
    close together that a rounding changes their order, and with it the places of the queries on the grid.
    Their scores are compared before.
    """
    if not isinstance(one, DecoPlus) or not isinstance(other, DecoPlus):
        before, after = one(images), other(images)
    else:
        with replaced(one.decoder, "select", Selection(one.decoder.select)) as first:
            before = one(images)
        second = Selection(other.decoder.select, first.selected)
        with replaced(other.decoder, "select", second):
            after = other(images)
        scores, same = (found[2].amax(dim=-1) for found in (first.selected, second.own))
        torch.testing.assert_close(scores, same, rtol=0, atol=1e-5)
    return max(float((before[name] - after[name]).abs().max()) for name in ("boxes", "logits"))


class Selection:
    """A decoder's `select` that keeps what it selected, or gives what another one did.

    Args:
        select: the decoder's own.
        given: to be returned instead of what it selects.
    """

    def __init__(self, select: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...] = ()) -> None:
        self.select = select
        self.given = given
        self.own: tuple[Tensor, ...] = ()

    def __call__(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        self.own = self.select(levels)
        return self.given or self.own

    @property
    def selected(self) -> tuple[Tensor, ...]:
        return self.given or self.own


@contextlib.contextmanager
def replaced(owner: nn.Module, name: str, value: Any) -> Iterator[Any]:
    """An attribute of an instance, for a while instead of its class's."""
    setattr(owner, name, value)
    try:
        yield value
    finally:
        delattr(owner, name)


def captured(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """The compiled forward pass as a CUDA graph."""
    compiled = torch.compile(network, mode="reduce-overhead")
    for _ in range(3):
        compiled(images)
    return partial(compiled, images)


def timed(networks: Mapping[str, nn.Module], images: Tensor, options: argparse.Namespace) -> Seconds:
    """Interleaved forward passes of some networks over one batch."""
    calls: dict[str, Callable[[], object]] = {n: partial(net, images) for n, net in networks.items()}
    if options.device == "cuda":
        calls |= {f"{name}, compiled": captured(net, images) for name, net in networks.items()}
    return interleaved(calls, options.repeats, clock(options.device, options.threads)[1])


def against(seconds: Seconds, base: str) -> dict[str, dict[str, Any]]:
    """Median seconds of everything, and how many times faster than `base` it is."""
    rows = {}
    for name, values in seconds.items():
        found = ratios(seconds[base], values)
        rows[name] = {
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "ratio": statistics.median(found),
            "ratio_by_min": min(seconds[base]) / min(values),
            "ratios": found,
        }
    return rows


def compare_forms(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The deployed against the training form of one network."""
    networks = {form: build(name, form).to(options.device) for form in FORMS}
    images = noise(batch, options)
    largest = difference(*networks.values(), images)
    rows = against(timed(networks, images, options), "training")
    return {"network": name, "batch": batch, "rows": rows, "difference": largest}


def compare_detr(names: list[str], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both forms of ours against DETR-R50 as it is."""
    networks = {"detr-r50": build("detr-r50", "training").to(options.device)}
    for name in names:
        networks |= {f"{name}, {form}": build(name, form).to(options.device) for form in FORMS}
    rows = against(timed(networks, noise(batch, options), options), "detr-r50")
    return {"network": "detr-r50", "batch": batch, "rows": rows}


def noise(batch: int, options: argparse.Namespace) -> Tensor:
    height, width = options.size
    return torch.randn(batch, 3, height, width, device=options.device)


def memory_of(name: str, form: str, batch: int, options: argparse.Namespace) -> float:
    """Peak MiB of a process that builds one network and runs it, in a process of its own."""
    line = ["--memory-of", name, form, "--batches", batch, "--size", *options.size]
    return float(in_own_process(__file__, *line, "--device", options.device))


def measure_memory(name: str, form: str, options: argparse.Namespace) -> float:
    """Peak MiB of forward passes: on the CPU with weights and libraries, on a GPU with weights."""
    network = build(name, form).to(options.device)
    forget_peak()
    images = noise(options.batches[0], options)
    for _ in range(2):
        network(images)
    return peak_mebibytes()


def report(found: Mapping[str, Any]) -> str:
    """A Markdown table of one comparison, slowest form first."""
    heads = [f"{found['network']}, batch {found['batch']}"]
    heads += ["ms, median", "times as fast", "smallest-largest"]
    rows = []
    for name, row in found["rows"].items():
        cells = [name, f"{1e3 * row['median_seconds']:.1f}", f"{row['ratio']:.3f}"]
        cells.append(f"{min(row['ratios']):.3f}-{max(row['ratios']):.3f}")
        rows.append(cells)
    lines = [markdown(heads, rows)]
    if "difference" in found:
        lines.append(f"\nlargest difference of boxes and logits: {found['difference']:.1e}")
    if "memory" in found:
        peaks = ", ".join(f"{form} {peak:.0f} MiB" for form, peak in found["memory"].items())
        lines.append(f"peak memory of the process: {peaks}")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=["deco-r50", "decoplus-r50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, nargs=2, default=[640, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", nargs="+", choices=["deploy", "detr"], default=["deploy", "detr"])
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.inference_mode()
def main() -> int:
    options = parsed()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.memory_of:
        print(measure_memory(*options.memory_of, options))
        return 0
    print(
        f"{options.size[0]} x {options.size[1]} pixels, {options.device}, threads: {options.threads}; "
        f"{clock(options.device, options.threads)[0]}, medians of {options.repeats} interleaved rounds"
    )
    results: list[dict[str, Any]] = []
    tasks = [partial(compare_forms, name, batch) for name in options.networks for batch in options.batches]
    tasks = tasks if "deploy" in options.parts else []
    if "detr" in options.parts:
        tasks += [partial(compare_detr, options.networks, batch) for batch in options.batches]
    for task in tasks:
        found = task(options)
        if not options.no_memory and "difference" in found:
            peaks = {form: memory_of(found["network"], form, found["batch"], options) for form in FORMS}
            found["memory"] = peaks
        results.append(found)
        print(f"\n{report(found)}", flush=True)
    write_numbers(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
