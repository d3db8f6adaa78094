"""Everything mode: masks without prompts, from a full grid of points or in two rounds (section 2.6)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms


@dataclass(frozen=True)
class Everything:
    """How masks are generated; the released defaults.

    Args:
        mode: `hierarchical` asks a coarse grid, and then only where nothing is sure yet; `grid` asks all.
        points_per_side: of the fine grid.
        coarse_points: per side of the coarse grid; null is a quarter of the fine one.
        confident: tau, the logit above which a pixel of a kept mask is sure.
        min_iou: least predicted IoU.
        min_stability: least stability, the IoU of the masks at thresholds +1 and -1.
        overlap: boxes that overlap more are one mask.
    """

    mode: Literal["hierarchical", "grid"] = "hierarchical"
    points_per_side: int = 32
    coarse_points: int | None = None
    confident: float = 8.5
    min_iou: float = 0.88
    min_stability: float = 0.95
    overlap: float = 0.7

    def __post_init__(self) -> None:
        if self.points_per_side < 1 or (self.coarse_points or 1) < 1:
            raise ValueError("everything: points_per_side and coarse_points are at least 1.")


class Found(NamedTuple):
    """Masks of some prompts that are kept."""

    masks: NDArray[np.bool_]
    """(n, height, width)."""
    iou: Tensor
    """(n,), predicted."""


Ask = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From points (n, 2) in pixels to logits (n, K, height, width) and predicted IoUs (n, K)."""


def generate(ask: Ask, height: int, width: int, options: Everything, batch: int = 64) -> Found:
    """The masks of a picture, best first.

    Args:
        ask: the segmenter.
        height: of the picture, pixels.
        width: of it.
        options: how.
        batch: points asked at a time.
    """
    scale, size = torch.tensor([width, height]), (height, width)
    if options.mode == "grid":
        found = _round(ask, grid(options.points_per_side) * scale, options, batch, size)
        return _distinct(found, options.overlap)
    sure = np.zeros(size, np.bool_)
    coarse = grid(options.coarse_points or max(1, options.points_per_side // 4)) * scale
    first = _round(ask, coarse, options, batch, size, sure)
    second = _round(ask, fine_points(coarse, sure, options.points_per_side), options, batch, size)
    joined = Found(np.concatenate([second.masks, first.masks]), torch.cat([second.iou, first.iou]))
    return _distinct(joined, options.overlap)


def grid(count: int) -> Tensor:
    """Points (count^2, 2) in [0, 1], x fastest."""
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def fine_points(coarse: Tensor, sure: NDArray[np.bool_], count: int) -> Tensor:
    """The points of the second round, (n, 2): around each coarse one, at strides of the fine grid, where
    nothing is sure yet.

    Args:
        coarse: (m, 2) in pixels.
        sure: (height, width).
        count: of the fine grid, per side.

    Raises:
        ValueError: the picture is smaller than the grid.
    """
    height, width = sure.shape
    dx, dy = width // count, height // count
    if not dx or not dy:
        raise ValueError(f"everything: a picture of {width} x {height} pixels has no {count} points a side.")
    points = []
    for x, y in coarse.tolist():
        around = [(x + i * dx, y + j * dy) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
        right, below = x + 2 * dx < width, y + 2 * dy < height
        around += [(x + 2 * dx, y + j * dy) for j in (-1, 0, 1) if right]
        around += [(x + i * dx, y + 2 * dy) for i in (-1, 0, 1) if below]
        around += [(x + 2 * dx, y + 2 * dy)] if right and below else []
        points += [(a, b) for a, b in around if not sure[int(b), int(a)]]
    return torch.tensor(points, dtype=torch.float64).reshape(-1, 2)


def _round(
    ask: Ask,
    points: Tensor,
    options: Everything,
    batch: int,
    size: tuple[int, int],
    sure: NDArray[np.bool_] | None = None,
) -> Found:
    """What is kept of the masks of points; `sure` is set where they are sure of something."""
    masks, scores = [np.zeros((0, *size), np.bool_)], [torch.zeros(0)]
    for chosen in points.split(batch) if len(points) else ():
        logits, iou = (part.flatten(0, 1) for part in ask(chosen))
        likely = iou > options.min_iou
        logits, iou = logits[likely], iou[likely]
        high, low = ((logits > offset).sum(dim=(1, 2)) for offset in (1.0, -1.0))
        stable = (high / low.clamp(min=1) >= options.min_stability) & (low > 0)
        logits = logits[stable]
        masks.append((logits > 0).cpu().numpy())
        scores.append(iou[stable].float().cpu())
        if sure is not None and len(logits):
            sure |= (logits > options.confident).any(dim=0).cpu().numpy()
    return Found(np.concatenate(masks), torch.cat(scores))


def _distinct(found: Found, overlap: float) -> Found:
    """One mask of those whose boxes overlap, the one of the highest predicted IoU; sorted by it."""
    boxes = torch.tensor([_box(mask) for mask in found.masks], dtype=torch.float32).reshape(-1, 4)
    kept = nms(boxes, found.iou, overlap)
    return Found(found.masks[kept.numpy()], found.iou[kept])


def _box(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """First and last column and row, as x1, y1, x2, y2; zeros where the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
