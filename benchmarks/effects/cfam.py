"""CFAM's parts on drawn pedestrians, unseen identities, three seeds.

    python benchmarks/effects/cfam.py [--identities 320] [--steps 400] [--seeds 0 1 2] [--variants CFAM ...]

Identities come in twins that differ in the colour of the shoes alone, which every caption names last: of 77
tokens it is cut off. A tiny CLIP learns from random weights, with the weights of the quick start, so what the
losses do to a pretrained CLIP is not seen here. R@1, mAP and mSD of the last step, mean (smallest-largest);
`twins` is the share of sentences whose own identity is ranked before its twin, 50 by chance. CLIP's byte
pairs are renumbered to those that occur. A finished run is kept in --runs and not repeated.
"""

import argparse
import json
import logging
import time
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from harness import Results, spread, table
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import default_collate

from datamodules import PersonRetrievalDataModule
from datamodules.person_retrieval import PersonTransforms
from lightning_modules.cfam import CFAM, LossSettings
from lightning_modules.parts.retrieval import ranking_scores, summary

VISION = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8}
TEXT = {"width": 64, "heads": 1, "layers": 1}
SIZE, LONG, SHORT = (64, 24), 120, 77
"""Pixels; tokens: no drawn caption is longer than 120."""
new = partial(LossSettings, temperature=0.07)
ALONE = {"local_weight": 0.0, "match_weight": 0.0, "cid_weight": 0.0}
ALL = {"local_weight": 0.1, "match_weight": 0.1, "cid_weight": 0.1}
VARIANTS: dict[str, tuple[LossSettings, int]] = {
    "plain CLIP": (new(global_loss="itc", **ALONE), LONG),
    "plain CLIP, 77 tokens": (new(global_loss="itc", **ALONE), SHORT),
    "IRRA-like": (new(**{**ALONE, "id_weight": 0.1}), LONG),
    "CFAM": (new(**ALL), LONG),
    "CFAM, 77 tokens": (new(**ALL), SHORT),
    "CFAM, random negatives": (new(**ALL, mining="random"), LONG),
    "CFAM without matching": (new(**{**ALL, "match_weight": 0.0}), LONG),
    "CFAM without local loss": (new(**{**ALL, "local_weight": 0.0}), LONG),
    "CFAM without identities": (new(**{**ALL, "cid_weight": 0.0}), LONG),
}
METRICS = ("R1", "mAP", "mSD", "twins")


class Pedestrians:
    """All pictures and captions in memory.

    Args:
        root: of the sample.
        identities: how many are drawn.
        length: tokens of a caption.
    """

    def __init__(self, root: Path, identities: int, length: int) -> None:
        data = PersonRetrievalDataModule(
            root=root,
            sample=True,
            sample_identities=identities,
            context_length=length,
            transforms=PersonTransforms(SIZE, augment=False),
            val_source="test",
            num_workers=0,
        )
        data.prepare_data()
        for stage in ("fit", "test"):
            data.setup(stage)
        read = data.transforms.evaluation()
        train, gallery, queries = (data.datasets[part] for part in ("train", "test_gallery", "test_queries"))
        pairs: Any = train
        first = {int(row): index for index, row in reversed(list(enumerate(pairs.rows)))}
        self.rows = torch.as_tensor(pairs.rows)
        self.pictures = torch.stack([read(pairs[first[row]]["image"]) for row in range(len(first))])
        self.identities = torch.as_tensor(pairs.identities)
        self.gallery = default_collate(
            [{**s, "image": read(s["image"])} for s in map(gallery.__getitem__, range(len(gallery)))]
        )
        self.queries = default_collate([queries[index] for index in range(len(queries))])
        known = torch.cat([pairs.ids, self.queries["input_ids"]]).unique()
        self.ids = torch.searchsorted(known, pairs.ids)
        self.queries["input_ids"] = torch.searchsorted(known, self.queries["input_ids"])
        self.vocabulary, self.num_classes = len(known), data.num_classes

    def batch(self, size: int) -> dict[str, Tensor]:
        """Random pairs."""
        pairs = torch.randperm(len(self.ids))[:size]
        found = {"image": self.pictures[self.rows[pairs]], "input_ids": self.ids[pairs]}
        return {**found, "identity": self.identities[pairs]}


pedestrians = lru_cache(Pedestrians)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and test a variant; its metrics and CPU seconds."""
    kept = options.runs / f"{name.replace(' ', '_')}-{seed}-{options.steps}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    settings, length = VARIANTS[name]
    data = pedestrians(options.runs / f"pedestrians-{options.identities}", options.identities, length)
    began = time.process_time()
    seed_everything(seed, verbose=False)
    model = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": data.vocabulary}}
    size = {"image_size": SIZE, "context_length": length, "num_queries": 4, "num_classes": data.num_classes}
    module = CFAM(model, None, settings=settings, lr_multipliers={}, **size)
    train(module, data, options.steps)
    report = measured(module, data) | {"seconds": time.process_time() - began}
    kept.write_text(json.dumps(report))
    print(
        f"  {name}, seed {seed}: " + ", ".join(f"{key} {value:.1f}" for key, value in report.items()),
        flush=True,
    )
    return report


def train(module: CFAM, data: Pedestrians, steps: int) -> None:
    """Adam with one cycle; 48 pairs a step."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.2)
    module.train()
    for _ in range(steps):
        batch = data.batch(48)
        optimizer.zero_grad()
        torch.stack(list(module.losses(module.compute(batch), batch).values())).sum().backward()
        optimizer.step()
        schedule.step()
    module.eval()


@torch.no_grad()
def measured(module: CFAM, data: Pedestrians) -> dict[str, float]:
    """Percentages, see `METRICS`."""
    gallery = module.encode_image(module.normalize(data.gallery["image"]))
    queries = module.encode_text(data.queries["input_ids"])
    owners, ids = data.gallery["identity"], data.queries["identity"]
    found = summary(ranking_scores(queries, ids, gallery, owners))
    report = {key: float(found[key]) for key in METRICS[:3]}
    best = [
        (queries @ gallery.T).masked_fill(owners != who[:, None], -1).amax(1) for who in (ids, twin_of(ids))
    ]
    return report | {"twins": 100 * float((best[0] > best[1]).double().mean())}


def twin_of(identities: Tensor) -> Tensor:
    """Numbers of the twins: 1 and 2, 3 and 4, and so on are twins."""
    return (identities - 1 ^ 1) + 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/effects_cfam"))
    parser.add_argument("--identities", type=int, default=320)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    return parser.parse_args()


def main() -> None:
    options = parsed()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    results: Results = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            results[name].append(run(name, seed, options))
    rows = [
        [name, *(spread([report[key] for report in reports], digits=1) for key in (*METRICS, "seconds"))]
        for name, reports in results.items()
    ]
    print(table(["variant", "R@1", "mAP", "mSD", "twins", "CPU s"], rows))


if __name__ == "__main__":
    main()
