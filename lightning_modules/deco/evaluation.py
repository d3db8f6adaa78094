"""COCO's average precision, computed by pycocotools itself over the images of all ranks."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.deco.boxes import Detections
from lightning_modules.parts.distributed import computed_once

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers in their order: precision at all and at single IoUs and by size, and recall."""


class CocoEvaluation:
    """Collects detections and ground truth of images, then gives COCO's numbers.

    Each image counts once, whichever ranks saw it and however often. Nothing is exchanged before
    `compute`, so the ranks may see different numbers of images, and none at all.

    Example:
        >>> evaluation = CocoEvaluation()
        >>> evaluation.update(image_ids, detections, annotations)
        >>> evaluation.compute()["AP"]
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._images: dict[int, tuple[NDArray[np.float64], Sequence[Mapping[str, Any]]]] = {}

    def update(
        self, image_ids: Tensor, detections: Detections, annotations: Sequence[Sequence[Mapping[str, Any]]]
    ) -> None:
        """Add a batch.

        Args:
            image_ids: (batch,) int64.
            detections: of these images, in pixels of the originals.
            annotations: an image's ground truth: dictionaries of `bbox` (x, y, w, h) in pixels, `area`,
                `iscrowd` and `category_id` (the label).
        """
        corners = detections.boxes.double().cpu().numpy()  # (batch, k, 4)
        rows = np.concatenate(
            [
                corners[..., :2],
                corners[..., 2:] - corners[..., :2],
                detections.scores.double().cpu().numpy()[..., None],
                detections.labels.cpu().numpy()[..., None],
            ],
            axis=-1,
        )  # (batch, k, 6): x, y, w, h, score, label
        for image_id, found, truth in zip(image_ids.tolist(), rows, annotations, strict=True):
            self._images.setdefault(image_id, (found, truth))

    def compute(self) -> dict[str, float]:
        """The twelve numbers over all ranks, the same on each; -1 where no object is of a kind.

        To be called on every rank. The images are kept until `reset`.
        """
        return computed_once(self._images, coco_statistics)


def coco_statistics(
    images: Mapping[int, tuple[NDArray[np.float64], Sequence[Mapping[str, Any]]]],
) -> dict[str, float]:
    """COCO's twelve numbers for boxes.

    Args:
        images: by id, detections (k, 6) as x, y, w, h, score, label, and the ground truth, see
            `CocoEvaluation.update`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # by place, as ids may be too large for the rows of floats
    parts = dict(enumerate((part for _, part in sorted(images.items())), start=1))
    truth = [{**annotation, "image_id": key} for key, (_, objects) in parts.items() for annotation in objects]
    if not truth:  # pycocotools cannot evaluate nothing, and means -1 by it
        return dict.fromkeys(STATISTICS, -1.0)
    rows = [np.insert(found, 0, key, axis=1) for key, (found, _) in parts.items()]
    labels = {int(annotation["category_id"]) for annotation in truth}
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = {
            "info": {},
            "images": [{"id": key} for key in parts],
            "annotations": [{**annotation, "id": place} for place, annotation in enumerate(truth, start=1)],
            "categories": [{"id": label} for label in sorted(labels)],
        }
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(np.concatenate(rows)), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATISTICS, map(float, evaluation.stats), strict=True))
