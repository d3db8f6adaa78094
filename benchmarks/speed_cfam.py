"""CFAM: metrics against a plain calculation, a step of all parts against plain CLIP, and an index's answers.

    python benchmarks/speed.py cfam [--queries 10000 --images 5000] [--crops 10000] [--repeats 3] [--timed 4]

Metrics: vectors of 512 numbers, identities with 5 images each. The plain calculation is written out here as
the paper's section 4.3 defines it and as the released script goes about it: the whole similarity, sorted at
once, then a loop over the queries. It runs in float64, so that both can be compared to 1e-9. Peak memory from
processes of their own, above the vectors. Steps: forward, losses, backward and optimiser of ViT-B/16. Where
`--timed` pairs are fewer than `--batch-size`, their forward and backward pass is multiplied, as both cost the
same for each pair, while an update of the weights is counted once. Answers: the search in
an index on disk, a sentence each time, without the text tower.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import clock, forget_peak, in_own_process, interleaved, peak_mebibytes, ratios, write_numbers
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datamodules.features import FeatureCache
from datamodules.person_retrieval import PersonTransforms
from datamodules.person_retrieval.datasets import GalleryDataset
from datamodules.person_retrieval.gallery import SHARD_BYTES, open_index
from lightning_modules.cfam import CFAM, LossSettings
from lightning_modules.parts.retrieval import best_matches, ranking_scores, summary

WIDTH, EACH = 512, 5


def vectors(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and gallery with identities; a query is near to the images of its own."""
    stream = torch.Generator().manual_seed(0)
    count = options.images // EACH
    people = torch.randn(count, WIDTH, generator=stream)
    ids, owners = torch.arange(options.queries) % count, torch.arange(options.images) % count
    noisy = [people[i] + 5 * torch.randn(len(i), WIDTH, generator=stream) for i in (ids, owners)]
    queries, gallery = (F.normalize(part.double(), dim=1) for part in noisy)
    return queries, ids, gallery, owners


def plain(queries: Tensor, ids: Tensor, gallery: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """The whole similarity, sorted at once, then query by query."""
    similarity = queries @ gallery.T
    order = similarity.argsort(dim=1, descending=True, stable=True)
    matches = owners[order] == ids[:, None]
    similarity = similarity.gather(1, order)
    found: dict[str, list[Tensor]] = {name: [] for name in ("R1", "R5", "R10", "mAP", "mINP", "mSD")}
    for m, cosines in zip(matches, similarity, strict=True):
        s, places = (cosines + 1) / 2, torch.arange(1, len(m) + 1)
        hits, number = m.cumsum(0), m.sum()
        for k in (1, 5, 10):
            found[f"R{k}"].append((hits[min(k, len(m)) - 1] > 0).double())
        found["mAP"].append((hits[m].double() / places[m]).sum() / number)
        found["mINP"].append(number.double() / places[m][-1])
        precision = (((m * s).cumsum(0) / s.cumsum(0))[m]).sum() / number
        found["mSD"].append((1 - torch.exp(-s[m].mean() / s[~m].mean())) * precision)
    return {name: 100 * torch.stack(values).mean() for name, values in found.items()}


def ours(queries: Tensor, ids: Tensor, gallery: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """In chunks, without sorting."""
    return summary(ranking_scores(queries, ids, gallery, owners))


WAYS = {"plain": plain, "ours": ours}


def metrics(options: argparse.Namespace) -> dict[str, Any]:
    """Times, the largest difference, and peak memory."""
    data = vectors(options)
    name, now = clock("cpu", torch.get_num_threads())
    found, times = {}, {}
    for way, calculate in WAYS.items():
        began = now()
        found[way] = calculate(*data)
        times[way] = now() - began
    apart = max(float((found["plain"][key] - value).abs()) for key, value in found["ours"].items())
    memory = {}
    for way in WAYS:
        line = ["--memory-of", way, "--queries", options.queries, "--images", options.images]
        memory[way] = float(in_own_process(__file__, *line, own_pages=True))
    faster, smaller = times["plain"] / times["ours"], memory["plain"] / memory["ours"]
    print(f"metrics of {options.queries} queries x {options.images} images, {name}:")
    print(f"  plain {times['plain']:.2f} s, ours {times['ours']:.2f} s: {faster:.1f} times faster")
    print(f"  largest difference {apart:.1e} (percent)")
    print(f"  peak memory {memory['plain']:.0f} and {memory['ours']:.0f} MiB: {smaller:.1f} times less")
    return {"seconds": times, "difference": apart, "memory_mebibytes": memory}


def peak_of(options: argparse.Namespace) -> float:
    """Most that a calculation takes above its vectors, MiB."""
    data = vectors(options)
    forget_peak()
    before = peak_mebibytes()
    WAYS[options.memory_of](*data)
    return peak_mebibytes() - before


def module(settings: LossSettings, options: argparse.Namespace) -> CFAM:
    """CFAM with random weights; `small` has a quarter of ViT-B/16's width and a third of its depth."""
    torch.manual_seed(0)
    small = {
        "embed_dim": 128,
        "vision_cfg": {"layers": 4, "width": 192, "head_width": 64, "patch_size": 16},
        "text_cfg": {"vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
    }
    model = small if options.model == "small" else options.model
    size = {"image_size": tuple(options.size), "context_length": options.context_length}
    return CFAM(model, None, settings=settings, num_classes=6926, lr_multipliers={}, **size)


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """A training step of every part against plain CLIP."""
    stream = torch.Generator().manual_seed(0)
    count, whole = min(options.timed, options.batch_size), options.batch_size
    ids = torch.randint(1, 49000, (count, options.context_length), generator=stream)
    ids[:, -1] = 49407
    batch = {
        "image": torch.rand(count, 3, *options.size, generator=stream),
        "input_ids": ids,
        "identity": torch.arange(count) // min(4, max(1, count // 2)),
    }
    off = {"local_weight": 0.0, "match_weight": 0.0, "cid_weight": 0.0}
    settings = {"all parts": LossSettings(), "plain CLIP": LossSettings(global_loss="itc", **off)}
    calls: dict[str, Any] = {}
    towers = None
    for name, chosen in settings.items():
        built = module(chosen, options)
        towers = built.base_model = towers or built.base_model  # one pair of towers saves memory
        calls[name] = partial(passes, built, batch)
        calls[f"update, {name}"] = built.configure_optimizers().step
    unit, now = clock("cpu", torch.get_num_threads())
    parts = interleaved(calls, options.repeats, now)
    times = {
        name: [p * whole / count + u for p, u in zip(parts[name], parts[f"update, {name}"], strict=True)]
        for name in settings
    }
    by_round = sorted(ratios(times["all parts"], times["plain CLIP"]))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    height, width = options.size
    print(
        f"a step of {whole} pairs ({count} timed) of {options.model}, {height} x {width}, "
        f"{options.context_length} tokens, {unit}:"
    )
    print(f"  all parts {seconds['all parts']:.2f} s, plain CLIP {seconds['plain CLIP']:.2f} s")
    print(f"  {statistics.median(by_round):.2f} times ({by_round[0]:.2f}-{by_round[-1]:.2f})")
    return {"seconds": seconds, "ratios": by_round, "parts": parts}


def arithmetic(options: argparse.Namespace) -> dict[str, float]:
    """Operations of both passes with every part over those of plain CLIP; nothing is computed."""
    with torch.device("meta"):
        built: Any = module(LossSettings(), options)
        image = torch.rand(options.batch_size, 3, *options.size)
        ids = torch.zeros(options.batch_size, options.context_length, dtype=torch.int64)

        def counted(every_part: bool) -> int:
            with FlopCounterMode(display=False) as counter:
                v, t = built.base_model.image_tokens(image), built.base_model.text_tokens(ids)
                loss = v[:, 0].sum() + t[:, 0].sum()
                if every_part:
                    decoded = [built.granularity_decoder(side).repeat(3, 1, 1) for side in (v, t)]
                    pair = [side[:, 0].repeat(3, 1) for side in (v, t)]
                    loss = built.matcher(*decoded).sum() + sum(
                        built.cid_head(*each).sum() for each in (pair, pair[::-1])
                    )
                loss.backward()
            return counter.get_total_flops()

        found = {"plain CLIP": counted(False), "all parts": counted(True)}
    ratio = found["all parts"] / found["plain CLIP"]
    print(
        f"operations of {options.batch_size} pairs of {options.model}: {ratio:.3f} times those of plain CLIP"
    )
    return {**found, "ratio": ratio}


def passes(built: CFAM, batch: dict[str, Tensor]) -> None:
    built.zero_grad()
    torch.stack(list(built.losses(built.compute(batch), batch).values())).sum().backward()


class _Random:
    """An encoder of 512 numbers that costs nothing: what is timed is the search."""

    key, model, width = "random", "random", WIDTH

    def to(self, device: Any) -> "_Random":
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return F.normalize(torch.randn(len(images), WIDTH), dim=1)


def answers(options: argparse.Namespace) -> dict[str, Any]:
    """A sentence's search in an index on disk."""
    with tempfile.TemporaryDirectory() as name:
        crop = Path(name) / "crop.png"
        Image.new("RGB", (8, 16)).save(crop)
        dataset = GalleryDataset([crop] * options.crops, None)
        cache = FeatureCache(Path(name) / "index", _Random(), batch_size=512, shard_bytes=SHARD_BYTES)
        gallery = open_index(Path(name) / "index", cache, dataset, PersonTransforms((16, 8)))
        times = []
        for _ in range(20):
            query = F.normalize(torch.randn(1, WIDTH), dim=1)
            began = time.perf_counter()
            best_matches(query, gallery.chunks(), 10)
            times.append(1000 * (time.perf_counter() - began))
    print(f"one sentence over {options.crops} indexed crops: first {times[0]:.1f} ms, then", end=" ")
    print(f"{statistics.median(times[1:]):.1f} ms (at most {max(times[1:]):.1f}), wall time")
    return {"milliseconds": times}


SUBJECTS = {"metrics": metrics, "arithmetic": arithmetic, "steps": steps, "answers": answers}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=10000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--crops", type=int, default=10000)
    parser.add_argument("--size", type=int, nargs=2, default=(384, 128), help="height and width, pixels")
    parser.add_argument("--context-length", type=int, default=168)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--timed", type=int, default=4, help="pairs of a timed forward and backward pass")
    parser.add_argument("--model", default="ViT-B-16", help="open_clip's name, or small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SUBJECTS, help="one of them")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_of(options))
        return 0
    chosen = [options.only] if options.only else list(SUBJECTS)
    write_numbers(options.json, {name: SUBJECTS[name](options) for name in chosen})
    return 0


if __name__ == "__main__":
    sys.exit(main())
