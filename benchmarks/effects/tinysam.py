"""TinySAM's distillation against its parts, on drawn scenes and on COCO's photographs and masks.

    python benchmarks/effects/tinysam.py --data coco_mini

No weights of SAM are used: a teacher with a larger encoder is trained on the ground truth of the scenes
first, and goes on from there on the photographs. Every student has a small TinyViT, starts with the teacher's
prompt encoder and decoder, and has a fifth of its steps: with the ground truth alone, with the teacher's
masks beside it (output), and as TinySAM: embeddings, tokens and masks, hard prompts and hard mask weights.
Mean IoU with the ground truth after one and after three clicks on pictures that nobody was trained on. What
is finished is kept.
"""

import argparse
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import spread, table
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from pycocotools.coco import COCO

from callbacks import SAMTeacher
from datamodules import SA1BDataModule
from datamodules.coco.segmentation import encode_mask
from datamodules.samples.sa1b import write_sa1b
from lightning_modules import TinySAMModule
from lightning_modules.parts.schedules import WarmupSchedule
from lightning_modules.tinysam import SAM, HardPrompts, Protocol, TinyViT
from lightning_modules.tinysam.training import copy_decoder

SETS = ("scenes", "coco")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "ground truth only": None,
    "output only": {"embedding_weight": 0.0, "token_weight": 0.0, "hard_mask_weighting": False},
    "TinySAM": {},
}
SIDE, WIDTH = 128, 64
TEACHER = {"dims": (16, 32, 48, 64), "depths": (1, 2, 2, 1), "heads": (1, 2, 3, 4), "windows": (7, 7, 4, 4)}
STUDENT = {"dims": (8, 16, 32, 40), "depths": (1, 1, 2, 1), "heads": (1, 1, 2, 2), "windows": (7, 7, 4, 4)}


# Data


def write_coco_masks(coco: Path, root: Path) -> None:
    """COCO's photographs with their instance masks as pairs of SA-1B: training and validation together, told
    apart by a file of ids.
    """
    if root.exists():
        return
    unfinished = root.with_name(f".{root.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for split in ("train2017", "val2017"):
        annotations = COCO(str(coco / "annotations" / f"instances_{split}.json"))
        keys = []
        for key, image in annotations.imgs.items():
            entries = annotations.loadAnns(annotations.getAnnIds(imgIds=key, iscrowd=False))
            masks = [annotations.annToMask(entry).astype(bool) for entry in entries]
            masks = [mask for mask in masks if mask.sum() > 0.01 * mask.size]
            if masks:
                write_pair(unfinished, key, coco / split / image["file_name"], masks)
                keys.append(f"sa_{key}")
        (unfinished / f"{split}.txt").write_text("\n".join(keys))
    unfinished.rename(root)


def write_pair(root: Path, key: int, picture: Path, masks: Sequence[np.ndarray]) -> None:
    """One picture of SA-1B; at most 320 pixels."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((320, 320))
    small = [
        np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)) > 0
        for mask in masks
    ]
    image.save(root / f"sa_{key}.jpg", quality=92)
    size = {"image_id": key, "width": image.width, "height": image.height, "file_name": f"sa_{key}.jpg"}
    entries = [{"id": place, "segmentation": encode_mask(mask)} for place, mask in enumerate(small)]
    (root / f"sa_{key}.json").write_text(json.dumps({"image": size, "annotations": entries}))


def data_of(name: str, options: argparse.Namespace, split: str) -> SA1BDataModule:
    """Pictures to train on, or those that are held out."""
    root = options.runs / name
    ids = root / f"{split}2017.txt" if name == "coco" else None
    return SA1BDataModule(
        root=root,
        image_size=SIDE,
        masks_per_image=4,
        ids=ids,
        val_fraction=1e-9 if name == "coco" and split == "train" else 1 - 1e-9 if name == "coco" else 0.15,
        val_masks=4,
        batch_size=8,
        num_workers=0,
    )


# Runs


def segmenter(sizes: Mapping[str, Any]) -> SAM:
    return SAM(SIDE, TinyViT(**sizes, width=WIDTH), width=WIDTH, hidden=256)


def train(
    name: str, network: SAM, steps: int, teacher: SAMTeacher | None, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Train and test; mean IoU after each click and the seconds of CPU."""
    seed_everything(seed, verbose=False)
    hard = teacher is not None and teacher.hard_mask_weighting
    student = network.image_encoder.patch_embed.seq[0].c.out_channels < TEACHER["dims"][0] // 2
    module = TinySAMModule(
        network,
        prompts=HardPrompts(enabled=hard, rounds=3),
        protocol=Protocol(clicks=3),
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        lr_scheduler=partial(WarmupSchedule, warmup_epochs=0.5),
        lr_multipliers={"network.mask_decoder.*": 0.1} if student else None,
    )
    module.weights_origin = "teacher's decoder"  # copied already
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if teacher is None else [teacher],
    )
    start = time.process_time()
    trainer.fit(module, datamodule=data_of(name, options, "train"))
    seconds = time.process_time() - start
    scores = trainer.test(module, datamodule=data_of(name, options, "val"), verbose=False)[0]
    return {**{key.removeprefix("test/"): value for key, value in scores.items()}, "cpu_seconds": seconds}


def kept(path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a run found, from its file where it is finished."""
    if not path.exists():
        report = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))
        print(f"  done: {path.stem}, {report['cpu_seconds']:.0f} s of CPU", flush=True)
    return json.loads(path.read_text())


def teacher_of(name: str, options: argparse.Namespace) -> tuple[SAM, dict[str, float]]:
    """The teacher of a data set, trained once with seed 0; that of photographs begins as that of scenes."""
    torch.manual_seed(0)
    weights = options.runs / f"teacher-{name}.pt"
    network = segmenter(TEACHER) if name == SETS[0] else teacher_of(SETS[0], options)[0]

    def make() -> dict[str, float]:
        report = train(name, network, options.teacher_steps, None, 0, options)
        torch.save(network.state_dict(), weights)
        return report

    report = kept(options.runs / "results" / f"teacher-{name}.json", make)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network, report


def student_of(
    name: str, variant: str, seed: int, options: argparse.Namespace
) -> tuple[SAM, dict[str, float]]:
    """A student of the data set's teacher, trained once."""
    stem = f"{name}-{variant}-{seed}".replace(" ", "_")
    network, weights = segmenter(STUDENT), options.runs / f"{stem}.pt"

    def make() -> dict[str, float]:
        teacher, _ = teacher_of(name, options)
        torch.manual_seed(seed)
        student = segmenter(STUDENT)
        copy_decoder(teacher, student, "the teacher")
        arguments = VARIANTS[variant]
        callback = None if arguments is None else SAMTeacher(teacher, copy_decoder=False, **arguments)
        report = train(name, student, options.steps, callback, seed, options)
        torch.save(student.state_dict(), weights)
        return report

    report = kept(options.runs / "results" / f"{stem}.json", make)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network, report


def report_of(name: str, options: argparse.Namespace) -> str:
    """The table of a data set."""
    _, teacher = teacher_of(name, options)
    rows = [["teacher", f"{teacher['miou1']:.3f}", f"{teacher['miou3']:.3f}"]]
    found = {
        variant: [student_of(name, variant, seed, options)[1] for seed in options.seeds]
        for variant in VARIANTS
    }
    for variant, reports in found.items():
        cells = [spread([report[key] for report in reports], 1, 3) for key in ("miou1", "miou3")]
        rows.append([variant, *cells])
    return table([name, "mean IoU, one click", "three clicks"], rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="COCO's layout: train2017, val2017, annotations"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/tinysam"), help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", choices=SETS, nargs="+", default=list(SETS))
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=80)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    write_sa1b(options.runs / "scenes", size=400, image_size=SIDE)
    if "coco" in options.sets:
        write_coco_masks(options.data, options.runs / "coco")
    for name in options.sets:
        print(f"\n{report_of(name, options)}", flush=True)


if __name__ == "__main__":
    main()
