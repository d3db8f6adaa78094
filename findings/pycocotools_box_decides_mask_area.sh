#!/usr/bin/env bash
# pycocotools 2.0.11: mask results that also carry their box are measured with the area of the box. COCO.loadRes overwrites
# `area` with width x height as soon as the first result has a bbox, so a thin mask counts as medium or large when it is
# matched to nothing, and the AP of small, medium and large masks changes while the AP over all sizes stays. Seen for two
# thin masks of 240 pixels, the better scored of them wrong: AP small 0.5 without a bbox, 1.0 with it; AP 0.5 in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "pycocotools==2.0.11" "numpy==2.4.6"
venv/bin/python - <<'PYTHON'
import contextlib
import io
from importlib.metadata import version

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def run_lengths(mask: np.ndarray) -> dict:
    encoded = masks.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**encoded, "counts": encoded["counts"].decode()}


def diagonal(rising: bool) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    for i in range(60):
        mask[70 - i if rising else 10 + i, 10 + i : 14 + i] = True
    return mask


right, wrong = run_lengths(diagonal(False)), run_lengths(diagonal(True))
box = [10.0, 10.0, 63.0, 60.0]
truth = COCO()
truth.dataset = {
    "images": [{"id": 1, "height": 100, "width": 100}],
    "categories": [{"id": 1, "name": "stick"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": right, "area": 240, "bbox": box}
    ],
}
ap, small, areas = {}, {}, {}
for name, extra in (("without", {}), ("with", {"bbox": box})):
    entry = {"image_id": 1, "category_id": 1, **extra}
    results = [entry | {"segmentation": right, "score": 0.9}, entry | {"segmentation": wrong, "score": 0.95}]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        detections = truth.loadRes(results)
        evaluation = COCOeval(truth, detections, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap[name], small[name] = (round(float(evaluation.stats[i]), 3) for i in (0, 3))
    areas[name] = [int(entry["area"]) for entry in detections.dataset["annotations"]]
print(f"pycocotools {version('pycocotools')}: AP {ap}, AP small {small}, areas {areas}")
assert ap == {"without": 0.5, "with": 0.5}
assert small == {"without": 0.5, "with": 1.0}
assert areas == {"without": [240, 240], "with": [3780, 3780]}
PYTHON
