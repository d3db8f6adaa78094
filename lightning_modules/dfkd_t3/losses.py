"""What generator and student of DFKD-T3 minimise, as pure functions: tensors in, a scalar out.

Shapes: B texts, L positions, V tokens, C classes. Sections are those of the reconstruction that the room's
README describes. Everything is computed in float32 (float64 inputs stay float64).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["kl", "reverse_kl", "js", "l1"]


def full(tensor: Tensor) -> Tensor:
    """At least float32: half precision is too coarse for logarithms of small probabilities."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# Specificity: the teacher is sure


def onehot_specificity(logits: Tensor) -> Tensor:
    """-mean_b log max_c p_bc of teacher logits (B, C) (section 2.3); log C where p is uniform."""
    return -full(logits).log_softmax(dim=-1).amax(dim=-1).mean()


def label_specificity(logits: Tensor, labels: Tensor) -> Tensor:
    """-mean_b log p_{b, y_b} of teacher logits (B, C) and the classes (B,) that the generator was given."""
    return F.cross_entropy(full(logits), labels)


# Diversity


def negative_entropy(distribution: Tensor) -> Tensor:
    """sum_i d_i log d_i of a distribution (n,), in [-log n, 0]: of mean classes it is the balance term, of
    mean tokens the token diversity. The gradient at an entry of 0 is finite.
    """
    smallest = torch.finfo(distribution.dtype).tiny
    return (distribution * distribution.clamp(min=smallest).log()).sum()


def mean_class_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of p (B, C) in nats, of logits."""
    log_p = full(logits).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def bags(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Bags beta (B, V): mean of pi (B, L, V) over the valid positions of each text."""
    weights = mask.to(probabilities.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights.unsqueeze(1), probabilities).squeeze(1)


def pairwise_cosine(texts: Tensor) -> Tensor:
    """Mean cosine of the bags (B, V) of different texts: 1 where all are equal, 0 where none shares a token.

    A batch of one text has no pair: 0.
    """
    count = len(texts)
    if count < 2:
        return texts.sum() * 0
    units = F.normalize(texts, dim=1, eps=torch.finfo(texts.dtype).tiny)
    total = units.sum(dim=0)
    return (total @ total - (units * units).sum()) / (count * (count - 1))


# Adversarial: what the student does not know


def divergence(
    teacher: Tensor,
    student: Tensor,
    kind: Divergence = "kl",
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """D(p, q), mean over samples: T^2 KL(p || q), T^2 KL(q || p), T^2 JS, or the sum of |p - q| at T = 1.

    Gradients flow into both sides.

    Args:
        teacher: logits (B, C).
        student: logits (B, C).
        kind: which of them.
        temperature: T.
        clip: largest value of a sample; above it the gradient is zero. None: as it is.
    """
    teacher, student = full(teacher), full(student)
    if kind == "l1":
        values = (teacher.softmax(dim=-1) - student.softmax(dim=-1)).abs().sum(dim=-1)
    else:
        log_p = (teacher / temperature).log_softmax(dim=-1)
        log_q = (student / temperature).log_softmax(dim=-1)
        if kind == "kl":
            values = _kl(log_p, log_q)
        elif kind == "reverse_kl":
            values = _kl(log_q, log_p)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            values = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
        values = temperature**2 * values
    return (values if clip is None else values.clamp(max=clip)).mean()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL (B,) of log-probabilities (B, C)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def token_divergence(teacher: Tensor, student: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL of two token-level logits (B, L, C), averaged over the valid positions of mask (B, L)."""
    valid = mask.bool()
    return divergence(teacher[valid], student[valid], "kl", temperature)


# Content: what is written stays a transform of what was read


def content_loss(logits: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of generator logits (B, L, V) against the source's ids (B, L), mean over mask (B, L)."""
    losses = F.cross_entropy(full(logits).flatten(0, 1), source.flatten(), reduction="none")
    weights = mask.flatten().to(losses.dtype)
    return (losses * weights).sum() / weights.sum()


def anchor_loss(logits: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """KL(G || first G) of logits (B, L, V) each, averaged over the valid positions of mask (B, L)."""
    log_p = full(logits).log_softmax(dim=-1)
    values = _kl(log_p, full(reference).log_softmax(dim=-1))
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum()
