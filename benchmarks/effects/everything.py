"""Everything mode on trained weights: two rounds against the full grid.

    python benchmarks/effects/everything.py --photos folder --data coco_mini --runs runs/effects/tinysam

The segmenter is the teacher of `effects/tinysam.py`, which is trained if it is not there, so its masks are
those of a small network; filters and tau are set for it, as its logits are smaller than SAM's. Photographs,
COCO's validation pictures and held-out drawn scenes: CPU time in turns, prompts, recall of the true masks,
and the share of the full grid's masks that two rounds find at IoU 0.8.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tinysam
import torch
from harness import table
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from datamodules.samples.sa1b import write_sa1b
from lightning_modules.tinysam.evaluation import best_ious
from lightning_modules.tinysam.everything import Everything, MaskGenerator
from lightning_modules.tinysam.network import SAM
from lightning_modules.tinysam.protocols import encode

Picture = tuple[NDArray[np.uint8], list[dict[str, Any]]]
"""RGB, and the true masks as run lengths."""


def photographs(options: argparse.Namespace) -> Iterator[Picture]:
    """No masks are known of them."""
    for path in sorted(options.photos.glob("*.jpg")):
        yield np.asarray(Image.open(path).convert("RGB")), []


def coco(options: argparse.Namespace) -> Iterator[Picture]:
    """The first pictures of validation."""
    annotations = COCO(str(options.data / "annotations" / "instances_val2017.json"))
    for key in sorted(annotations.imgs)[: options.pictures]:
        path = options.data / "val2017" / annotations.imgs[key]["file_name"]
        entries = annotations.loadAnns(annotations.getAnnIds(imgIds=key, iscrowd=False))
        masks = [encode(annotations.annToMask(entry).astype(bool)) for entry in entries]
        yield np.asarray(Image.open(path).convert("RGB")), masks


def scenes(options: argparse.Namespace) -> Iterator[Picture]:
    """Drawn pictures that nobody was trained on."""
    data = tinysam.data_of("scenes", options, "val")
    data.setup("test")
    for _, batch in zip(range(options.pictures), data.test_dataloader(), strict=False):
        for picture, truth in zip(batch["picture"], batch["truth"], strict=True):
            yield np.asarray(picture), [encode(np.asarray(mask)) for mask in truth]


def compared(network: SAM, pictures: Iterator[Picture], ways: dict[str, Everything]) -> list[list[str]]:
    """A row of the table for each way."""
    sums = {way: {"seconds": 0.0, "prompts": 0, "masks": 0, "found": 0} for way in ways}
    recalled: dict[str, list[float]] = {way: [] for way in ways}
    total = 0
    for number, (picture, truth) in enumerate(pictures):
        names = list(ways)[number % 2 :] + list(ways)[: number % 2]
        masks = {}
        for way in names:
            generator = MaskGenerator(network, ways[way])
            start = time.process_time()
            records = generator.generate(picture)
            sums[way]["seconds"] += time.process_time() - start
            sums[way]["prompts"] += generator.prompts
            masks[way] = [record["segmentation"] for record in records]
        total += len(masks["full grid"])
        for way, generated in masks.items():
            sums[way]["masks"] += len(generated)
            sums[way]["found"] += int((best_ious(masks["full grid"], generated) >= 0.8).sum())
            recalled[way] += best_ious(truth, generated).tolist()
    rows = []
    for way, numbers in sums.items():
        best = np.array(recalled[way])
        recall = [f"{(best >= limit).mean():.3f}" if len(best) else "" for limit in (0.5, 0.75)]
        faster = sums["full grid"]["seconds"] / numbers["seconds"]
        counts = [str(numbers["prompts"]), str(numbers["masks"]), f"{numbers['found'] / max(total, 1):.3f}"]
        rows.append([way, f"{numbers['seconds']:.1f}", f"{faster:.2f}", *counts, *recall])
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of .jpg files")
    parser.add_argument("--data", type=Path, required=True, help="COCO's layout: val2017, annotations")
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/tinysam"))
    parser.add_argument("--teacher", choices=tinysam.SETS, default="scenes", help="trained on")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=10, help="most of COCO's and of the scenes")
    parser.add_argument("--tau", type=float, nargs="+", default=[8.5, 3.0], help="high_score_thresh")
    parser.add_argument("--iou", type=float, default=0.5, help="pred_iou_thresh")
    parser.add_argument("--stability", type=float, default=0.8, help="stability_score_thresh")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    write_sa1b(options.runs / "scenes", size=400, image_size=tinysam.SIDE)
    network = tinysam.teacher_of(options.teacher, options)[0].eval()
    filters: dict[str, Any] = {
        "pred_iou_thresh": options.iou,
        "stability_score_thresh": options.stability,
        "output": "coco_rle",
    }
    ways = {"full grid": Everything(rounds=1, **filters)}
    ways |= {f"two rounds, tau {tau:g}": Everything(high_score_thresh=tau, **filters) for tau in options.tau}
    heads = ["CPU s", "times faster", "prompts", "masks", "of the grid's", "recall at 0.5", "at 0.75"]
    for pictures in (photographs, coco, scenes):
        rows = compared(network, pictures(options), ways)
        print("\n" + table([pictures.__name__, *heads], rows), flush=True)


if __name__ == "__main__":
    main()
