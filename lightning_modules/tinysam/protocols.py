"""How validation and test prompt a segmenter: clicks on every mask, a detector's boxes, or everything."""

import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.parts.options import check_range
from lightning_modules.tinysam.evaluation import (
    MaskEvaluation,
    MeanOverMasks,
    PictureRecords,
    best_ious,
    ious_by_click,
)
from lightning_modules.tinysam.everything import Everything, MaskGenerator
from lightning_modules.tinysam.predictor import Predictor, full_size
from lightning_modules.tinysam.prompts import best_mask


@dataclass(frozen=True)
class Protocol:
    """How validation and test prompt.

    Args:
        kind: `points` clicks on each mask, in the middle of the largest mistake, and measures the mean IoU
            after each click (`miou1`, ...); `boxes` prompts with a detector's boxes and measures mask AP;
            `everything` generates masks without prompts and measures how many of the true ones are among them
            (`recall50`, `recall75`, and the mean of the largest IoUs, `miou`) and the `seconds` a picture.
        clicks: most clicks on a mask.
        batch: prompts decoded at a time.
        everything: how masks are generated without prompts.
    """

    kind: Literal["points", "boxes", "everything"] = "points"
    clicks: int = 9
    batch: int = 64
    everything: Everything = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_range("protocol.clicks", self.clicks, "[1, inf)")
        check_range("protocol.batch", self.batch, "[1, inf)")


class View:
    """A picture of a batch, embedded, to be asked for masks in its own pixels.

    Args:
        network: of the segmenter.
        embedding: of the picture, (1, 256, h, w).
        size: its height and width in the frame.
        orig_size: and on disk.
    """

    def __init__(
        self, network: Any, embedding: Tensor, size: tuple[int, int], orig_size: tuple[int, int], batch: int
    ) -> None:
        self.network = network
        self.embedding = embedding
        self.size, self.orig_size, self.batch = size, orig_size, batch
        height, width = (ours / theirs for ours, theirs in zip(size, orig_size, strict=True))
        self._scale = torch.tensor([width, height], device=embedding.device)

    def of_points(self, points: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        """The best masks (n, height, width) of prompts of k points (n, k, 2) each, with labels (n, k)."""
        found = []
        for start in range(0, len(points), self.batch):
            rows = slice(start, start + self.batch)
            given = points[rows].to(self._scale) * self._scale, labels[rows].to(self._scale.device)
            found.append(self._best(points=given, boxes=None))
        return self._joined(found)

    def of_boxes(self, boxes: Tensor) -> NDArray[np.bool_]:
        """The best masks (n, height, width) of boxes (n, 4)."""
        found = []
        for start in range(0, len(boxes), self.batch):
            given = boxes[start : start + self.batch].to(self._scale) * self._scale.repeat(2)
            found.append(self._best(points=None, boxes=given))
        return self._joined(found)

    def _best(self, **prompts: Any) -> NDArray[np.bool_]:
        sparse, dense = self.network.prompt_encoder(**prompts, masks=None)
        position = self.network.prompt_encoder.get_dense_pe()
        masks, iou, _ = self.network.mask_decoder(self.embedding, position, sparse, dense)
        best = best_mask(masks, iou)[:, None].float()
        full = full_size(best, self.network.image_size, self.size, self.orig_size)
        return (full[:, 0] > 0).cpu().numpy()

    def _joined(self, masks: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
        return np.concatenate(masks) if masks else np.zeros((0, *self.orig_size), np.bool_)


class Measure:
    """What a protocol measures; batches go in, numbers come out at the end."""

    main: str
    """The number that progress bars show."""

    def __init__(self, options: Protocol) -> None:
        self.options = options
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._means = MeanOverMasks()

    def update(self, network: Any, embedding: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Measure the pictures of a batch; gives the predicted IoUs and such, for whoever looks for NaN."""
        for place in range(len(embedding)):
            size, orig_size = (tuple(batch[name][place].tolist()) for name in ("size", "orig_size"))
            view = View(network, embedding[place : place + 1], size, orig_size, self.options.batch)
            self.picture(view, {name: values[place] for name, values in batch.items()})
        return {"embedding": embedding}

    def picture(self, view: View, sample: dict[str, Any]) -> None:
        """Measure one picture."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """The numbers, the same on every rank. A collective."""
        return self._means.compute()


class ClickMeasure(Measure):
    """Mean IoU after each click."""

    main = "miou1"

    def picture(self, view: View, sample: dict[str, Any]) -> None:
        """Click on each of its masks."""
        truth = _of(sample, "truth").numpy()
        ious = ious_by_click(truth, view.of_points, self.options.clicks)
        columns = {f"miou{number + 1}": ious[:, number] for number in range(self.options.clicks)}
        self._means.update(int(sample["index"]), columns)


class BoxMeasure(Measure):
    """Mask AP of a detector's boxes, and the mean IoU with the ground truth's own."""

    main = "AP"

    def reset(self) -> None:
        """Forget all pictures."""
        super().reset()
        self._evaluation = MaskEvaluation()

    def picture(self, view: View, sample: dict[str, Any]) -> None:
        """Prompt with each of its boxes; the score is the detector's."""
        masks = view.of_boxes(_of(sample, "boxes"))
        detections = [
            {"segmentation": encode(mask), "category_id": int(category), "score": float(score)}
            for mask, category, score in zip(masks, sample["categories"], sample["scores"], strict=True)
        ]
        records = PictureRecords(
            view.orig_size, detections, sample["annotations"], sample["negative"], sample["not_exhaustive"]
        )
        self._evaluation.update(int(sample["index"]), records)

    def compute(self) -> dict[str, float]:
        """Mask AP. A collective."""
        return self._evaluation.compute()


class EverythingMeasure(Measure):
    """Recall of the true masks among those that are generated without prompts."""

    main = "recall50"

    def picture(self, view: View, sample: dict[str, Any]) -> None:
        """Generate, and compare."""
        start = time.perf_counter()
        options = replace(self.options.everything, output="coco_rle")
        records = MaskGenerator(view.network, options).generate(np.asarray(sample["picture"]))
        generated = [record["segmentation"] for record in records]
        seconds = time.perf_counter() - start
        truth = [encode(mask) for mask in _of(sample, "truth").numpy()]
        best = best_ious(truth, generated)
        values = {"recall50": best >= 0.5, "recall75": best >= 0.75, "miou": best}
        columns = {name: column.astype(np.float64) for name, column in values.items()}
        counts = {"masks": np.array([float(len(generated))]), "seconds": np.array([seconds])}
        self._means.update(int(sample["index"]), {**columns, **counts})


MEASURES = {"points": ClickMeasure, "boxes": BoxMeasure, "everything": EverythingMeasure}


def make_measure(options: Protocol) -> Measure:
    """What `options.kind` measures."""
    return MEASURES[options.kind](options)


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (height, width) as compressed run lengths."""
    from pycocotools import mask as coco_mask

    runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def _of(sample: dict[str, Any], name: str) -> Any:
    if name not in sample:
        raise MisconfigurationException(
            f"TinySAMModule: this protocol needs `{name}` in its batches, and those of this data module have "
            "none: boxes come from InstancePromptsDataModule, masks also from SA1BDataModule."
        )
    value = sample[name]
    return value.cpu() if isinstance(value, Tensor) else value


def predicted(
    network: Any,
    image: NDArray[np.uint8],
    prompts: list[dict[str, Any]] | None,
    options: Everything,
    path: str = "",
) -> list[dict[str, Any]]:
    """Records of a picture's masks, fit for JSON.

    Args:
        network: of the segmenter.
        image: RGB (height, width, 3).
        prompts: `points` and `labels`, or `box`, of each mask; None generates everything.
        options: how, then.
        path: of the picture, for the error.

    Raises:
        ValueError: a prompt lies outside of the picture, or is none.
    """
    if prompts is None:
        return MaskGenerator(network, replace(options, output="coco_rle")).generate(image)
    predictor = Predictor(network)
    predictor.set_image(image)
    records = []
    for place, prompt in enumerate(prompts):
        try:
            found = predictor.predict(**prompt)
        except (ValueError, TypeError) as error:
            raise ValueError(f"prompt [{place}] of {path}: {error}") from error
        mask = found.best
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [0, 0, 0, 0]
        if len(rows):
            left, top = int(columns[0]), int(rows[0])
            box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
        known = {"segmentation": encode(mask), "bbox": box, "area": int(mask.sum())}
        records.append({**known, "predicted_iou": float(found.iou.max()), **prompt})
    return records
