"""How masks are measured: COCO's and LVIS's mask AP, IoU by click, and recall of everything mode."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.parts.distributed import computed_once

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LVIS_DETECTIONS = 300
"""Most masks of a picture that LVIS counts, those of the highest scores; COCO counts 100 of each class."""

Masks = NDArray[np.bool_]


# Box prompts


class PictureRecords(NamedTuple):
    """What was predicted for a picture, and what is in it."""

    size: tuple[int, int]
    detections: Sequence[Mapping[str, Any]]
    """`segmentation` (compressed run lengths), `category_id` and the detector's `score`; no `bbox`, so that
    box and area come from the mask."""
    annotations: Sequence[Mapping[str, Any]]
    """COCO's ground truth."""
    negative: Sequence[int] | None = None
    """Categories that LVIS says are not there; None in COCO."""
    not_exhaustive: Sequence[int] | None = None
    """Categories of which LVIS says that not all are annotated."""


class MaskEvaluation:
    """Collects masks and ground truth of pictures, then gives the mask AP over those of all ranks.

    A picture counts once, whichever ranks saw it and however often.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._pictures: dict[int, PictureRecords] = {}

    def update(self, key: int, records: PictureRecords) -> None:
        """Add a picture."""
        self._pictures.setdefault(key, records)

    def compute(self) -> dict[str, float]:
        """`STATISTICS`, the same on every rank; -1 where no object is of a kind. A collective."""
        return computed_once(self._pictures, mask_statistics)


def mask_statistics(pictures: Mapping[int, PictureRecords]) -> dict[str, float]:
    """Mask AP of pictures by id, by LVIS's rules where they have lists of negative categories."""
    from pycocotools.coco import COCO

    ordered = dict(enumerate((records for _, records in sorted(pictures.items())), start=1))
    truth = [{**entry, "image_id": key} for key, records in ordered.items() for entry in records.annotations]
    if not truth:
        return dict.fromkeys(STATISTICS, -1.0)
    found = [{**entry, "image_id": key} for key, records in ordered.items() for entry in counted(records)]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = {
            "info": {},
            "images": [
                {"id": key, "height": records.size[0], "width": records.size[1]}
                for key, records in ordered.items()
            ],
            "annotations": [{**entry, "id": place} for place, entry in enumerate(truth, start=1)],
            "categories": [{"id": label} for label in sorted({int(e["category_id"]) for e in truth})],
        }
        expected.createIndex()
        results = expected.loadRes(found) if found else COCO()
        evaluation = _evaluation(expected, results, ordered)
        evaluation.evaluate()
        evaluation.accumulate()
    return summary(evaluation.eval["precision"])


def counted(records: PictureRecords) -> list[Mapping[str, Any]]:
    """The detections of a picture that count: in LVIS, of categories that it is annotated for."""
    if records.negative is None:
        return list(records.detections)
    known = {*records.negative, *(int(entry["category_id"]) for entry in records.annotations)}
    best = sorted(records.detections, key=lambda entry: -float(entry["score"]))[:LVIS_DETECTIONS]
    return [entry for entry in best if int(entry["category_id"]) in known]


def _evaluation(expected: Any, results: Any, pictures: Mapping[int, PictureRecords]) -> Any:
    from pycocotools.cocoeval import COCOeval

    class Federated(COCOeval):
        """Masks without a partner are no mistakes where a category is not fully annotated."""

        def evaluateImg(self, imgId: int, catId: int, aRng: Any, maxDet: int) -> Any:
            outcome = super().evaluateImg(imgId, catId, aRng, maxDet)
            if outcome is not None and catId in (pictures[imgId].not_exhaustive or ()):
                outcome["dtIgnore"] = np.logical_or(outcome["dtIgnore"], outcome["dtMatches"] == 0)
            return outcome

    evaluation = Federated(expected, results, iouType="segm")
    if any(records.negative is not None for records in pictures.values()):
        evaluation.params.maxDets = [1, 10, LVIS_DETECTIONS]
    return evaluation


def summary(precision: NDArray[np.float64]) -> dict[str, float]:
    """`STATISTICS` of precisions (IoU thresholds, recalls, categories, areas, limits)."""

    def mean(values: NDArray[np.float64]) -> float:
        known = values[values > -1]
        return float(known.mean()) if known.size else -1.0

    parts = [precision[:, :, :, 0, -1], precision[0, :, :, 0, -1], precision[5, :, :, 0, -1]]
    parts += [precision[:, :, :, area, -1] for area in (1, 2, 3)]
    return dict(zip(STATISTICS, map(mean, parts), strict=True))


# Clicks


def next_clicks(truth: Masks, predicted: Masks) -> tuple[Tensor, Tensor]:
    """Where a person would click next: in the middle of the larger mistake.

    It is the pixel of the largest distance to the border of what is missed, or of what is too much; the
    picture's border counts as one. With nothing predicted that is the middle of the mask. Where both are
    empty it is the first pixel of the mask, as a positive click.

    Args:
        truth: (n, height, width), none of them empty.
        predicted: likewise.

    Returns:
        Points (n, 2) as x, y, and labels (n,): 1 for what is missed, 0 for what is too much.
    """
    points, labels = [], []
    for wanted, given in zip(truth, predicted, strict=True):
        missed, depth = _middle(wanted & ~given)
        extra, depth_of_extra = _middle(given & ~wanted)
        positive = depth >= depth_of_extra
        if depth == depth_of_extra == 0:
            missed = tuple(np.argwhere(wanted)[0])
        y, x = missed if positive else extra
        points.append((float(x), float(y)))
        labels.append(int(positive))
    return torch.tensor(points).reshape(-1, 2), torch.tensor(labels, dtype=torch.int64)


def _middle(mask: Masks) -> tuple[tuple[int, ...], float]:
    """The innermost pixel (row, column) of a mask and its distance from the border; 0 if there is none."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0, 0), 0.0
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # outside of its box there is nothing
    depth = distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return (int(rows[0] + y), int(columns[0] + x)), float(depth[y, x])


Decode = Callable[[Tensor, Tensor], Masks]
"""From points (n, k, 2) in pixels of the picture and labels (n, k) to the best masks (n, height, width)."""


def ious_by_click(truth: Masks, decode: Decode, clicks: int) -> NDArray[np.float64]:
    """IoU (n, clicks) with each mask after so many clicks, which accumulate; no mask is fed back."""
    predicted = np.zeros_like(truth)
    points, labels = torch.zeros(len(truth), 0, 2), torch.zeros(len(truth), 0, dtype=torch.int64)
    found = []
    for _ in range(clicks if len(truth) else 0):
        point, label = next_clicks(truth, predicted)
        points, labels = torch.cat([points, point[:, None]], 1), torch.cat([labels, label[:, None]], 1)
        predicted = decode(points, labels)
        found.append(paired_iou(truth, predicted))
    return np.stack(found, axis=1) if found else np.zeros((0, clicks))


def paired_iou(first: Masks, second: Masks) -> NDArray[np.float64]:
    """IoU (n,) of masks (n, height, width) with their partners; 0 where both are empty."""
    union = (first | second).sum(axis=(1, 2))
    return (first & second).sum(axis=(1, 2)) / np.maximum(union, 1)


# Everything


def best_ious(
    truth: Sequence[Mapping[str, Any]], generated: Sequence[Mapping[str, Any]]
) -> NDArray[np.float64]:
    """The largest IoU of each true mask with the generated ones, (n,); all as compressed run lengths."""
    from pycocotools import mask as coco_mask

    if not truth or not generated:
        return np.zeros(len(truth))
    return coco_mask.iou(list(generated), list(truth), [0] * len(truth)).max(axis=0)


# Means over masks


class MeanOverMasks:
    """Means over the masks of all pictures and ranks; a picture counts once, by its key."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._pictures: dict[int, dict[str, NDArray[np.float64]]] = {}

    def update(self, key: int, values: dict[str, NDArray[np.float64]]) -> None:
        """Add a picture: values (n,) of its masks by name."""
        self._pictures.setdefault(key, values)

    def compute(self) -> dict[str, float]:
        """The mean of each name, the same on every rank; empty where there was no mask. A collective."""
        return computed_once(self._pictures, _means)


def _means(pictures: Mapping[int, Mapping[str, NDArray[np.float64]]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in pictures.values() for name in values)
    joined = {
        name: np.concatenate([values[name] for _, values in sorted(pictures.items()) if name in values])
        for name in names
    }
    return {name: float(values.mean()) for name, values in joined.items() if len(values)}
