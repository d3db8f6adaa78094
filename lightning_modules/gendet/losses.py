"""GenDet's losses as functions of teacher and student outputs (batch, dim); equations 1 to 3 of the paper."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum"]


def discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Elementwise squared difference D, same shape: what the detector reads."""
    return (teacher - student).square()


def agreement_loss(teacher: Tensor, student: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared difference, averaged over the batch: L_r (real stage) and L_g (augmenter stage).

    Args:
        teacher: z_t, (batch, dim).
        student: z_s, (batch, dim).
        reduction: over the entries of a vector; `sum` is the squared L2 norm, dim times larger. The paper
            does not say which.
    """
    values = discrepancy(teacher, student)
    return values.mean() if reduction == "mean" else values.sum(dim=-1).mean()


def separation(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of the normalised outputs, |u - w|^2 = 2 - 2 cos, in [0, 4]; (batch,)."""
    directions = F.normalize(teacher, dim=-1, eps=1e-12), F.normalize(student, dim=-1, eps=1e-12)
    return discrepancy(*directions).sum(dim=-1)


def disagreement_loss(teacher: Tensor, student: Tensor, margin: float = 2.0, alpha: float = 0.1) -> Tensor:
    """L_f of the fake stage: alpha times the mean of max(0, M - |u - w|^2).

    With M = 2 the student is pushed until its output is orthogonal to the teacher's, and left alone then.

    Args:
        teacher: z_t, (batch, dim).
        student: z_s, (batch, dim).
        margin: the paper's M, in (0, 4].
        alpha: the paper's weight.

    Raises:
        ValueError: the margin makes the loss always zero, or never.
    """
    check_margin(margin)
    return alpha * F.relu(margin - separation(teacher, student)).mean()


def check_margin(margin: float) -> None:
    """A margin that can bind and be met.

    Raises:
        ValueError: outside (0, 4].
    """
    if not 0 < margin <= 4:
        raise ValueError(
            f"margin: {margin} is outside (0, 4]: the squared distance of two directions is between 0 and 4."
        )
