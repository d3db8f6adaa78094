"""Small functions of everything mode: grids, crops, boxes, stability, run lengths, small regions."""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

EDGE = 20.0
"""Pixels from the border of a crop within which a box may be that of a cut object."""


def point_grid(side: int) -> NDArray[np.float64]:
    """Points (side x side, 2) in the middles of equal cells of the unit square, x fastest."""
    steps = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)


def crop_boxes(
    height: int, width: int, layers: int, overlap_ratio: float
) -> tuple[list[list[int]], list[int]]:
    """Boxes x0, y0, x1, y1 of the picture and of its overlapping crops, and the layer that each is of.

    Layer l has (2^(l+1))^2 crops for l = 0, 1, ...; the whole picture is said to be of layer 0, they of layer
    l + 1.
    """
    boxes, owners = [[0, 0, width, height]], [0]
    for layer in range(layers):
        count = 2 ** (layer + 1)
        overlap = int(overlap_ratio * min(height, width) * (2 / count))

        def starts(length: int, count: int = count, overlap: int = overlap) -> tuple[list[int], int]:
            size = math.ceil((overlap * (count - 1) + length) / count)
            return [place * (size - overlap) for place in range(count)], size

        (xs, crop_width), (ys, crop_height) = starts(width), starts(height)
        for x in xs:
            for y in ys:
                boxes.append([x, y, min(x + crop_width, width), min(y + crop_height, height)])
                owners.append(layer + 1)
    return boxes, owners


def stability_scores(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """IoU (n,) of the masks at a stricter and at a laxer threshold; 0 where both are empty.

    Args:
        logits: (n, height, width).
        threshold: of the mask.
        offset: between it and the two others.
    """
    strict = (logits > threshold + offset).sum(dim=(-1, -2)).float()
    lax = (logits > threshold - offset).sum(dim=(-1, -2)).float()
    return torch.where(lax > 0, strict / lax.clamp(min=1), 0.0)


def mask_boxes(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tight boxes (n, 4) as x0, y0, x1, y1 with inclusive ends; zeros for an empty mask.

    Args:
        masks: (n, height, width).
    """
    columns: NDArray[np.bool_] = np.any(masks, axis=1)
    rows: NDArray[np.bool_] = np.any(masks, axis=2)
    (height, width), full = masks.shape[1:], np.any(columns, axis=1)
    boxes = np.stack(
        [
            columns.argmax(axis=1),
            rows.argmax(axis=1),
            width - 1 - columns[:, ::-1].argmax(axis=1),
            height - 1 - rows[:, ::-1].argmax(axis=1),
        ],
        axis=1,
    )
    return np.where(full[:, None], boxes, 0)


def near_edge(boxes: NDArray[np.int64], crop: list[int], image: list[int]) -> NDArray[np.bool_]:
    """Which boxes (n, 4) touch a border of the crop that is none of the picture's."""
    at_crop = np.abs(boxes - np.array(crop)) <= EDGE
    at_image = np.abs(boxes - np.array(image)) <= EDGE
    near: NDArray[np.bool_] = np.any(at_crop & ~at_image, axis=1)
    return near


def box_xywh(box: list[int]) -> list[int]:
    """x, y, width, height of x0, y0, x1, y1, as SAM has it: the width of a mask's box is x1 - x0."""
    return [int(box[0]), int(box[1]), int(box[2] - box[0]), int(box[3] - box[1])]


def rle_counts(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs down the columns, zeros first.

    Args:
        mask: (height, width).
    """
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *counts] if flat.size and flat[0] else counts


def remove_small_regions(
    mask: NDArray[np.bool_], area: float, kind: Literal["holes", "islands"]
) -> tuple[NDArray[np.bool_], bool]:
    """A mask without its holes or islands below an area (8-connected), and whether anything changed.

    Where every island is small the largest stays.
    """
    working = mask ^ (kind == "holes")
    regions, count = ndimage.label(working, structure=np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    small = np.flatnonzero(sizes < area) + 1
    if not len(small):
        return mask, False
    if kind == "holes":
        return mask | np.isin(regions, small), True
    kept = np.setdiff1d(np.arange(1, count + 1), small)
    if not len(kept):
        kept = np.array([int(sizes.argmax()) + 1])
    return np.isin(regions, kept), True
