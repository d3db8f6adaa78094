"""The losses of TinySAM: full-stage distillation with hard mask weights, and SAM's own on ground truth.

Shapes: N prompts, each with its target mask; K mask outputs a prompt; masks (N, K, h, w) are logits. A
`valid` mask bool (N, h, w), or None, leaves the padding of the frame out of every mean over pixels. Every
function computes in float32 at least, whatever the precision of the run.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_WEIGHT, DICE_WEIGHT = 20.0, 1.0
"""SAM's; the paper names the two terms alone."""

Reduction = Literal["mean", "sum"]


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def mean_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean absolute difference: the paper's distance of embeddings and of tokens (its Eq. 2 and 3)."""
    return (wide(ours) - wide(theirs)).abs().mean()


def pixel_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the pixels of the picture.

    Args:
        values: (N, ..., h, w).
        valid: bool (N, h, w), or None: all pixels. A picture always has some.

    Returns:
        (N, ...).
    """
    if valid is None:
        return values.mean(dim=(-2, -1))
    weight = valid.reshape(len(valid), *[1] * (values.ndim - 3), *valid.shape[1:]).to(values.dtype)
    return (values * weight).sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1)).clamp(min=1)


def mask_iou(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """IoU of the thresholded masks with the targets, without gradient; 0 where both are empty.

    Args:
        logits: (N, K, h, w).
        target: bool (N, h, w).
        valid: bool (N, h, w).

    Returns:
        (N, K).
    """
    masks, expected = logits.detach() > 0, target[:, None]
    if valid is not None:
        masks, expected = masks & valid[:, None], expected & valid[:, None]
    intersection = (masks & expected).sum(dim=(-2, -1)).to(wide(logits).dtype)
    return intersection / (masks | expected).sum(dim=(-2, -1)).clamp(min=1)


def hard_mask_weight(teacher: Tensor, student: Tensor, eps: float = 1e-6) -> Tensor:
    """H = sigmoid(IoU of the teacher / (IoU of the student + eps) - 1), the paper's Eq. 6: 0.5 where they are
    equal, more where the student is worse. (The sentence under the equation swaps the two.)

    Args:
        teacher: (N,), the best IoU of its K masks.
        student: likewise.
        eps: unpublished.
    """
    return (teacher / (student + eps) - 1).sigmoid()


def output_loss(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None = None,
    kind: Literal["l1", "bce_dice"] = "l1",
) -> Tensor:
    """Distance of the student's masks from the teacher's, of each prompt: (N,).

    Args:
        student: (N, K, h, w) logits.
        teacher: likewise.
        valid: bool (N, h, w).
        kind: `l1` on the logits, as the paper is read here; `bce_dice` against the teacher's probabilities.
    """
    ours, theirs = wide(student), wide(teacher)
    if kind == "l1":
        return pixel_mean((ours - theirs).abs(), valid).mean(dim=1)
    wanted = theirs.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(ours, wanted, reduction="none")
    return (pixel_mean(entropy, valid) + dice_loss(ours, wanted, valid)).mean(dim=1)


def focal_loss(
    logits: Tensor, target: Tensor, valid: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Pixel mean of alpha_t (1 - p_t)^gamma times the cross-entropy, (N, K).

    Args:
        logits: (N, K, h, w).
        target: bool (N, h, w).
        valid: bool (N, h, w).
        alpha: weight of the foreground.
        gamma: exponent.
    """
    wanted = target[:, None].to(wide(logits).dtype).expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(wide(logits), wanted, reduction="none")
    probability = wide(logits).sigmoid()
    missed = probability * (1 - wanted) + (1 - probability) * wanted  # 1 - p_t
    weight = alpha * wanted + (1 - alpha) * (1 - wanted)
    return pixel_mean(weight * missed**gamma * entropy, valid)


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor | None = None, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum pG + smooth) / (sum p + sum G + smooth), (N, K); never divides by zero.

    Args:
        logits: (N, K, h, w).
        target: bool (N, h, w), or probabilities (N, K, h, w).
        valid: bool (N, h, w).
        smooth: of the quotient.
    """
    probability = wide(logits).sigmoid()
    wanted = (target[:, None] if target.ndim < logits.ndim else target).to(probability.dtype)
    if valid is not None:
        probability, wanted = probability * valid[:, None], wanted * valid[:, None]
    overlap = 2 * (probability * wanted).sum(dim=(-2, -1)) + smooth
    return 1 - overlap / (probability.sum(dim=(-2, -1)) + wanted.sum(dim=(-2, -1)) + smooth)


def mask_loss(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """20 focal + dice of the best of the K masks of each prompt, (N,); only that one gets a gradient."""
    focal, dice = focal_loss(logits, target, valid), dice_loss(logits, target, valid)
    return (FOCAL_WEIGHT * focal + DICE_WEIGHT * dice).min(dim=1).values


def iou_loss(predicted: Tensor, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean absolute error of the predicted IoUs (N, K): L1 as in the paper, where SAM squares."""
    return (wide(predicted) - mask_iou(logits, target, valid)).abs().mean()


def reduced(values: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Over the prompts: `sum` as the paper writes it, or `mean`, so that a weight is of no number of prompts.

    0, tied to what it is of, where there are none.
    """
    return values.sum() if reduction == "sum" or not len(values) else values.mean()
