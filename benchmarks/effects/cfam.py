"""CFAM's parts on drawn pedestrians, unseen identities, three seeds.

    python benchmarks/effects/cfam.py [--identities 160] [--steps 200] [--seeds 0 1 2]

Identities come in twins that differ in the colour of the shoes alone, which every caption names last: of 77
tokens it is cut off. A tiny CLIP learns from random weights, with the weights of the quick start, so what the
losses do to a pretrained CLIP is not seen here. R@1, mAP and mSD of the last step, mean (smallest-largest).
A finished run is kept in --runs and not repeated.
"""

import argparse
import json
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Results, spread, table
from lightning.pytorch import Trainer, seed_everything

from datamodules import PersonRetrievalDataModule
from datamodules.person_retrieval import PersonTransforms
from lightning_modules.cfam import CFAM, LossSettings

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8},
    "text_cfg": {"vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
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
    "CFAM, random negatives": (new(**ALL, mining="random"), LONG),
    "CFAM without matching": (new(**{**ALL, "match_weight": 0.0}), LONG),
}
METRICS = ("R1", "mAP", "mSD")


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and test a variant; its metrics and CPU seconds."""
    kept = options.runs / f"{name.replace(' ', '_')}-{seed}-{options.steps}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    began = time.process_time()
    seed_everything(seed, verbose=False)
    settings, length = VARIANTS[name]
    rate = partial(torch.optim.Adam, lr=1e-3)
    cycle = partial(
        torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=options.steps + 1, pct_start=0.2
    )
    size = {"image_size": SIZE, "context_length": length, "num_queries": 4}
    module = CFAM(MODEL, None, settings=settings, optimizer=rate, lr_multipliers={}, **size)
    module.lr_scheduler, module.lr_interval = cycle, "step"
    data = PersonRetrievalDataModule(
        root=options.runs / f"pedestrians-{options.identities}",
        sample=True,
        sample_identities=options.identities,
        context_length=length,
        transforms=PersonTransforms(SIZE, augment=False),
        val_source="test",
        batch_size=48,
        eval_batch_size=128,
        num_workers=0,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=options.steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    found = trainer.test(module, data, verbose=False)[0]
    report = {key: found[f"test/{key}"] for key in METRICS} | {"seconds": time.process_time() - began}
    kept.write_text(json.dumps(report))
    print(
        f"  {name}, seed {seed}: " + ", ".join(f"{key} {value:.1f}" for key, value in report.items()),
        flush=True,
    )
    return report


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/effects_cfam"))
    parser.add_argument("--identities", type=int, default=160)
    parser.add_argument("--steps", type=int, default=200)
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
    print(table(["variant", "R@1", "mAP", "mSD", "CPU s"], rows))


if __name__ == "__main__":
    main()
