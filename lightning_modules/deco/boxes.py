"""Box arithmetic over any leading dimensions, and the step from network outputs to detections."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert


def iou_and_giou(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and its generalised form (Rezatofighi et al. 2019), of boxes (x1, y1, x2, y2).

    Args:
        first: (..., 4).
        second: (..., 4), broadcast against `first`.

    Returns:
        IoU and GIoU, each (...). Boxes without any area give finite values.
    """
    low, high = torch.maximum(first, second), torch.minimum(first, second)
    overlap = (high[..., 2:] - low[..., :2]).clamp(min=0).prod(dim=-1)
    union = _area(first) + _area(second) - overlap
    hull = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(dim=-1)
    tiny = torch.finfo(union.dtype).tiny
    iou = overlap / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2), (..., 4)."""
    return box_convert(boxes, "cxcywh", "xyxy")


def normalised(boxes: Tensor, size: Tensor) -> Tensor:
    """Pixel corners to (cx, cy, w, h) as shares of the image.

    Args:
        boxes: (n, 4), (x1, y1, x2, y2) pixels.
        size: (2,), height and width of the image in pixels.
    """
    return box_convert(boxes, "xyxy", "cxcywh") / size.flip(0).repeat(2)


class Detections(NamedTuple):
    """The best detections of each image, best first."""

    scores: Tensor
    """(batch, k), in [0, 1]."""
    labels: Tensor
    """(batch, k), int64."""
    boxes: Tensor
    """(batch, k, 4), (x1, y1, x2, y2) in pixels of the original image; not clipped."""


def detections_of(
    logits: Tensor, boxes: Tensor, sizes: Tensor, count: int, category_ids: Tensor | None = None
) -> Detections:
    """The `count` best (query, class) pairs: no threshold, no NMS; a query may come with several labels.

    Args:
        logits: (batch, queries, classes).
        boxes: (batch, queries, 4), normalised (cx, cy, w, h).
        sizes: (batch, 2), height and width of the original images in pixels.
        count: detections an image, at most queries * classes.
        category_ids: (classes,), what to call each class; None keeps 0 ... classes - 1.
    """
    classes = logits.shape[-1]
    pairs = logits.float().sigmoid().flatten(1)  # (batch, queries * classes)
    scores, chosen = pairs.topk(min(count, pairs.shape[1]), dim=1)
    scale = sizes.flip(-1).repeat(1, 2)[:, None]  # (batch, 1, 4): width, height, width, height
    corners = to_corners(boxes.float()) * scale
    found = corners.gather(1, (chosen // classes)[..., None].expand(-1, -1, 4))
    labels = chosen % classes
    return Detections(scores, labels if category_ids is None else category_ids[labels], found)


def resized(batch: dict[str, Any], side: int, mode: Literal["nearest", "bilinear"]) -> dict[str, Any]:
    """A detection batch with its images resized to `side` x `side` pixels, and boxes and sizes with them."""
    height, width = batch["image"].shape[-2:]
    if (height, width) == (side, side):
        return batch
    images = F.interpolate(
        batch["image"], (side, side), mode=mode, align_corners=None if mode == "nearest" else False
    )
    mask = F.interpolate(batch["mask"][:, None].float(), (side, side))[:, 0] > 0
    factors = torch.tensor([side / width, side / height] * 2, device=images.device)
    targets = [_scaled_target(target, factors) for target in batch["targets"]]
    return {**batch, "image": images, "mask": mask, "targets": targets}


def _scaled_target(target: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    size = target["size"] * factors[:2].flip(0)
    return {**target, "boxes": target["boxes"] * factors, "size": size}
