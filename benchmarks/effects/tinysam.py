"""TinySAM's distillation on drawn scenes and on COCO's masks, and hierarchical against full-grid everything mode.

    python benchmarks/effects/tinysam.py --data coco_mini --images images

No weights of SAM are used: a teacher with a larger encoder is trained on the ground truth of each data set first.
Students with a small TinyViT have a third of its steps, and its decoder to start from: ground truth alone,
output distillation alone, and full-stage distillation with and without hard prompts and hard mask weights.
Reported are the mean IoU after one and three clicks on held-out pictures, mean over the seeds. The second table
asks on photographs how many of the full grid's masks the hierarchical mode finds. What is finished is kept.
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
from lightning_modules.tinysam import HardPrompts, Protocol

SETS = ("scenes", "coco")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "ground truth only": None,
    "output only": {"embedding_weight": 0.0, "token_weight": 0.0, "hard_mask_weighting": False},
    "embedding + token + output": {"hard_mask_weighting": False},
    "+ hard prompts": {"hard_mask_weighting": False},
    "+ hard mask weights (TinySAM)": {},
}
HARD = ("+ hard prompts", "+ hard mask weights (TinySAM)")


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
