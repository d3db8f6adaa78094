"""Prompts drawn from target masks, and the hard ones: where the student's own mask misses (section 2.4b).

Masks here are low-resolution ones, a pixel of which is `STRIDE` pixels of the frame; coordinates are pixels
of the frame.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STRIDE = 4


class Prompts(NamedTuple):
    """A positive point, or a box, for each of N masks."""

    points: Tensor
    """(N, 1, 2) as x, y."""
    boxes: Tensor
    """(N, 4) as x1, y1, x2, y2."""
    boxed: Tensor
    """bool (N,): the box is the prompt, not the point."""


def encode_prompts(prompt_encoder: nn.Module, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Sparse (N, 2, 256) and dense (N, 256, h, w) embeddings: a point with its padding, or two corners."""
    labels = torch.ones(prompts.points.shape[:2], dtype=torch.int64, device=prompts.points.device)
    sparse, dense = prompt_encoder(points=(prompts.points, labels), boxes=None, masks=None)
    if bool(prompts.boxed.any()):
        corners, _ = prompt_encoder(points=None, boxes=prompts.boxes, masks=None)
        sparse = torch.where(prompts.boxed[:, None, None], corners, sparse)
    return sparse, dense


def decode_prompts(sam: Any, embedding: Tensor, owner: Tensor, prompts: Prompts) -> dict[str, Tensor]:
    """What a segmenter's decoder says to prompts.

    Args:
        sam: has `prompt_encoder` and `mask_decoder`.
        embedding: of the images, (batch, 256, h, w).
        owner: (N,), the image of each prompt.
        prompts: N of them.

    Returns:
        `masks` (N, 3, 4h, 4w) logits, `iou` (N, 3) and `tokens` (N, 5, 256).
    """
    sparse, dense = encode_prompts(sam.prompt_encoder, prompts)
    position = sam.prompt_encoder.get_dense_pe()
    masks, iou, tokens = sam.mask_decoder(embedding[owner], position, sparse, dense)
    return {"masks": masks, "iou": iou, "tokens": tokens}


def draw_points(masks: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A point uniform over the pixels of each mask, the centre of its low-resolution pixel.

    Args:
        masks: bool (N, h, w), none of them empty.
        generator: of the draws; None: torch's own.

    Returns:
        (N, 1, 2) as x, y.
    """
    weights = masks.flatten(1).float()
    place = torch.multinomial(weights, 1, generator=generator)  # (N, 1)
    width = masks.shape[-1]
    cells = torch.stack([place % width, place // width], dim=-1)
    return cells * STRIDE + (STRIDE - 1) / 2


def boxes_of(masks: Tensor) -> Tensor:
    """The box of each mask, (N, 4) as x1, y1, x2, y2: the outer edges of its outermost pixels.

    Args:
        masks: bool (N, h, w), none of them empty.
    """
    rows, columns = masks.any(dim=2).int(), masks.any(dim=1).int()
    top, left = rows.argmax(dim=1), columns.argmax(dim=1)
    bottom = rows.shape[1] - rows.flip(1).argmax(dim=1)
    right = columns.shape[1] - columns.flip(1).argmax(dim=1)
    return STRIDE * torch.stack([left, top, right, bottom], dim=1).float()


def noisy_boxes(masks: Tensor, share: float = 0.1, most: float = 20.0) -> Tensor:
    """Boxes of masks with noise on each side: its standard deviation is a share of the side, the noise at
    most `most` pixels (SAM's recipe); (N, 4), within the frame, never turned inside out.
    """
    boxes = boxes_of(masks)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = (torch.randn_like(boxes) * share * sides).clamp(-most, most)
    height, width = masks.shape[1:]
    limits = boxes.new_tensor([width, height, width, height]) * STRIDE
    corners = (boxes + noise).clamp(min=0).minimum(limits)
    return torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], dim=1)


def missed_points(points: Tensor, masks: Tensor, predicted: Tensor) -> Tensor:
    """The next points: uniform over what a mask has and the prediction has not; the same where that is
    nothing.

    Args:
        points: (N, 1, 2), the last ones.
        masks: bool (N, h, w).
        predicted: bool (N, h, w).
    """
    missed = masks & ~predicted
    empty = ~missed.flatten(1).any(dim=1)
    drawn = draw_points(torch.where(empty[:, None, None], masks, missed))
    return torch.where(empty[:, None, None], points, drawn)


@torch.no_grad()
def hard_points(masks: Tensor, rounds: int, decode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Points on which the student fails, after so many rounds of asking it.

    Points do not accumulate: each round asks for the last one alone (the paper's Eq. 9), so every prompt is
    one positive point.

    Args:
        masks: bool (N, h, w), none of them empty.
        rounds: r; 0 gives points uniform over the masks.
        decode: from points (N, 1, 2) to mask logits (N, K, h, w) and predicted IoUs (N, K).

    Returns:
        (N, 1, 2).
    """
    points = draw_points(masks)
    for _ in range(rounds):
        points = missed_points(points, masks, best_mask(*decode(points)) > 0)
    return points


def best_mask(logits: Tensor, predicted: Tensor) -> Tensor:
    """The mask of the highest predicted IoU, (N, h, w), of logits (N, K, h, w) and IoUs (N, K)."""
    return logits[torch.arange(len(logits), device=logits.device), predicted.argmax(dim=1)]
