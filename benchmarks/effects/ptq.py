"""Post-training quantization against full precision: bits, and the searched steps against min-max.

    python benchmarks/effects/ptq.py --runs runs/effects/ptq [--sam runs/effects/tinysam]

(a) The quick start's classifier on its drawn sample, trained with three seeds. (b) With `--sam`, the
distilled students of `effects/tinysam.py` on drawn scenes, which are trained if they are not there. `KL` is
the mean divergence of the classes, or of the masks' pixels, from the full-precision network, and "same" the
mean IoU of the best masks with its best masks. Eight calibration images, everything else by default.
"""

import argparse
import copy
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import tinysam
import torch
import torch.nn.functional as F
from harness import spread, table
from lightning.pytorch import LightningModule, Trainer, seed_everything

from callbacks import HessianPTQ
from datamodules import CIFAR100DataModule
from datamodules.samples.sa1b import write_sa1b
from datamodules.transforms import ImageTransforms
from lightning_modules import ImageClassifier, TinySAMModule
from lightning_modules.tinysam import Protocol
from lightning_modules.tinysam.calibration import calibration_points
from lightning_modules.tinysam.prompts import Prompts, best_mask, decode_prompts

BITS = ((8, 8), (6, 6), (4, 8))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    shared = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, **quiet, **options}
    return Trainer(**shared, default_root_dir=folder, callbacks=callbacks)


def quantizer(bits: int, activation_bits: int, search: str) -> HessianPTQ:
    return HessianPTQ(bits=bits, activation_bits=activation_bits, search=search, resume=False)


@torch.no_grad()
def log_probabilities(module: LightningModule, images: torch.Tensor) -> torch.Tensor:
    return module.eval()(images).log_softmax(1)


def classifier(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Top-1 and KL of every variant."""
    seed_everything(seed, verbose=False)
    data = CIFAR100DataModule(
        root=options.runs / "data",
        sample=True,
        batch_size=64,
        num_workers=0,
        transforms=ImageTransforms(image_size=32, train_crop="pad"),
    )
    module = ImageClassifier(
        "vit_tiny_patch16_224", 10, model_args=VIT, optimizer=partial(torch.optim.AdamW, lr=1e-3)
    )
    trainer(options.runs, [], max_epochs=options.epochs, limit_val_batches=0).fit(module, datamodule=data)
    data.setup("test")
    images = torch.cat([batch["image"] for batch in data.test_dataloader()])
    full = log_probabilities(module, images)
    found = {}
    for name, callbacks in variants():
        changed = copy.deepcopy(module)
        scores = trainer(options.runs, callbacks).test(changed, datamodule=data, verbose=False)[0]
        ours = log_probabilities(changed, images)
        divergence = F.kl_div(ours, full, reduction="batchmean", log_target=True)
        found[name] = {"top1": 100 * scores["test/top1"], "kl": float(divergence)}
    return found


def variants() -> list[tuple[str, list[HessianPTQ]]]:
    rows: list[tuple[str, list[HessianPTQ]]] = [("float", [])]
    for bits in BITS:
        for search in ("minmax", "grid"):
            rows.append((f"W{bits[0]}A{bits[1]} {search}", [quantizer(*bits, search)]))
    return rows


def segmenter(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of every variant, mean IoU after one and after three clicks, and how near its masks are to float's."""
    shared = argparse.Namespace(runs=options.sam, teacher_steps=400, steps=80)
    options.sam.mkdir(parents=True, exist_ok=True)
    write_sa1b(options.sam / "scenes", size=400, image_size=tinysam.SIDE)
    network, _ = tinysam.student_of("scenes", "TinySAM", seed, shared)
    full = prompted(TinySAMModule(network), shared)
    found = {}
    for name, callbacks in variants():
        module = TinySAMModule(copy.deepcopy(network), protocol=Protocol(clicks=3))
        data = tinysam.data_of("scenes", shared, "val")
        scores = trainer(options.runs, callbacks).test(module, datamodule=data, verbose=False)[0]
        found[name] = {key.removeprefix("test/"): value for key, value in scores.items()}
        found[name] |= nearness(prompted(module, shared), full)
        print(f"  {seed} {name}: {found[name]}", flush=True)
    return found


@torch.no_grad()
def prompted(module: TinySAMModule, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Masks (N, 3, h, w) and predicted IoUs (N, 3) of points on the held-out pictures."""
    data = tinysam.data_of("scenes", options, "val")
    data.setup("test")
    parts = []
    for batch in data.test_dataloader():
        points, owner = calibration_points(batch, 4)
        prompts = Prompts(points, points.new_zeros(len(points), 4), torch.zeros_like(owner).bool())
        embedding = module.eval()(batch["image"], batch["size"])
        parts.append(decode_prompts(module.network, embedding, owner, prompts))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def nearness(ours: dict[str, torch.Tensor], full: dict[str, torch.Tensor]) -> dict[str, float]:
    """`kl` of the pixels, and `same`: the IoU of the best masks, 1 where both are empty."""
    logits, wanted = full["masks"], full["masks"].sigmoid()
    binary = F.binary_cross_entropy_with_logits
    best, theirs = (best_mask(made["masks"], made["iou"]) > 0 for made in (ours, full))
    union = (best | theirs).sum(dim=(1, 2))
    iou = ((best & theirs).sum(dim=(1, 2)) / union.clamp(min=1)).where(union > 0, torch.tensor(1.0))
    return {
        "kl": float(binary(ours["masks"], wanted) - binary(logits, wanted)),
        "same": float(iou.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/ptq"))
    parser.add_argument("--sam", type=Path, help="runs of effects/tinysam.py; none: the classifier alone")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sam-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reports = [classifier(seed, options) for seed in options.seeds]
    if reports:
        rows = [
            [
                name,
                spread([r[name]["top1"] for r in reports], 1, 1),
                spread([r[name]["kl"] for r in reports], 1, 5),
            ]
            for name in reports[0]
        ]
        print(table(["classifier", "top-1, %", "KL"], rows), flush=True)
    if options.sam:
        reports = [segmenter(seed, options) for seed in options.sam_seeds]
        digits = {"miou1": 3, "miou3": 3, "same": 3, "kl": 5}
        rows = [
            [name, *(spread([r[name][key] for r in reports], 1, places) for key, places in digits.items())]
            for name in reports[0]
        ]
        print("\n" + table(["TinySAM", "mean IoU, one click", "three clicks", "same", "KL"], rows))


if __name__ == "__main__":
    main()
