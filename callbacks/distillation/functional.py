"""Distillation losses as pure functions: tensors in, a scalar out; the teacher's side never gets a gradient.

Shapes: B samples, K classes, D features. Everything is computed in float32 (float64 inputs stay float64). The
sections named below are those of the OFA-KD paper (Hao et al., NeurIPS 2023, arXiv 2310.19444) unless said.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Variant = Literal["released", "paper"]

_MASKED = 1000.0  # what DKD takes off the target's logit: its exponential is zero in float32


def hard_labels(target: Tensor) -> Tensor:
    """Classes (B,) of hard labels (B,) or soft ones (B, K); the first of equally large classes wins."""
    return target if target.ndim == 1 else target.argmax(dim=1)


def ofa_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    gamma: float = 1.0,
    temperature: float = 1.0,
    variant: Variant = "released",
) -> Tensor:
    """OFA loss with adaptive target enhancement (section 3.3): mean over samples of - sum_i w_i log q_i.

    With teacher p = softmax(t / T), student q = softmax(s / T) and ground truth c, `released` (the authors'
    code) has w_i = (p_i + [i = c])^gamma - [i = c]; `paper` keeps w_i = p_i for i != c. At gamma = 1 both are
    T^-2 KD + H(p). There is no factor T^2.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        target: classes (B,) or soft labels (B, K), of which the largest counts.
        gamma: the modulating exponent; 1 is plain distillation.
        temperature: T.
        variant: which form of w.
    """
    log_q = (full_precision(student) / temperature).log_softmax(dim=1)
    p = (full_precision(teacher.detach()) / temperature).softmax(dim=1)
    is_target = F.one_hot(hard_labels(target), p.shape[1]).to(p.dtype)
    weights = (p + is_target) ** gamma - is_target
    if variant == "paper":
        weights = torch.where(is_target > 0, weights, p)
    return -(weights * log_q).sum(dim=1).mean()


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over samples (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: T.
    """
    log_q = (full_precision(student) / temperature).log_softmax(dim=1)
    log_p = (full_precision(teacher.detach()) / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def bkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross entropy of every student logit with the teacher's softmax, mean over all B K entries."""
    return F.binary_cross_entropy_with_logits(
        full_precision(student), full_precision(teacher.detach()).softmax(dim=1)
    )


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """Decoupled KD (Zhao et al., arXiv 2203.08679, eq. 7): alpha TCKD + beta NCKD.

    TCKD = T^2 KL of the pairs (p_c, 1 - p_c); NCKD = T^2 KL of the softmaxes over the classes that are not c.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        target: classes (B,) or soft labels (B, K), of which the largest counts.
        alpha: weight of the target part.
        beta: weight of the non-target part.
        temperature: T.
    """
    labels = hard_labels(target)
    is_target = F.one_hot(labels, student.shape[1]).bool()
    s, t = full_precision(student) / temperature, full_precision(teacher.detach()) / temperature
    tckd = F.kl_div(
        _target_pair(s, is_target), _target_pair(t, is_target), reduction="batchmean", log_target=True
    )
    others_s = (s - _MASKED * is_target).log_softmax(dim=1)
    others_t = (t - _MASKED * is_target).log_softmax(dim=1)
    nckd = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * tckd + beta * nckd)


def _target_pair(logits: Tensor, is_target: Tensor) -> Tensor:
    """(log p_c, log(1 - p_c)), (B, 2), without a subtraction that cancels."""
    log_p = logits.log_softmax(dim=1)
    target = log_p.masked_fill(~is_target, float("-inf")).logsumexp(dim=1)
    rest = log_p.masked_fill(is_target, float("-inf")).logsumexp(dim=1)
    return torch.stack([target, rest], dim=1)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST (Huang et al., arXiv 2205.10536, eq. 10): tau^2 (beta inter + gamma intra), in Pearson distances.

    inter compares each sample's class probabilities, intra each class's probabilities over the batch.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        temperature: tau.

    Raises:
        ValueError: fewer than two samples.
    """
    require_batch(student, "DIST")
    q = (full_precision(student) / temperature).softmax(dim=1)
    p = (full_precision(teacher.detach()) / temperature).softmax(dim=1)
    inter = 1 - _pearson(q, p).mean()
    intra = 1 - _pearson(q.t(), p.t()).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson correlation of the rows of two (R, N) matrices, (R,)."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + eps)


def fitnet_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of a projected student map and the teacher's, both (B, C, H, W).

    The hint loss of Romero et al., arXiv 1412.6550, equation 3.
    """
    return F.mse_loss(full_precision(projected), full_precision(teacher.detach()))


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation congruence as mdistiller has it: mean_{b < B-1} sum_j delta_{b,j} delta_{b+1,j}, delta =
    |e_s - e_t|.

    Both embeddings are trained, so both sides get a gradient. Without the factor 0.02, which is the
    criterion's weight.

    Args:
        student: embeddings e_s (B, D).
        teacher: embeddings e_t (B, D).

    Raises:
        ValueError: fewer than two samples.
    """
    require_batch(student, "CC")
    delta = (full_precision(student) - full_precision(teacher)).abs()
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


def rkd_distance_loss(student: Tensor, teacher: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Relational KD, distances (Park et al., arXiv 1904.05068, eq. 7): smooth L1 of normalised distance
    matrices.

    Args:
        student: features (B, D_s).
        teacher: features (B, D_t).
        squared: compare squared distances.
        eps: floor of a squared distance before the root.

    Raises:
        ValueError: fewer than two samples.
    """
    require_batch(student, "RKD")
    wanted = _normalised_distances(full_precision(teacher.detach()), squared, eps)
    return F.smooth_l1_loss(_normalised_distances(full_precision(student), squared, eps), wanted)


def _normalised_distances(features: Tensor, squared: bool, eps: float) -> Tensor:
    """Pairwise distances (B, B) over the mean of the positive ones; the diagonal is zero."""
    with _uncast(features):
        norms = features.square().sum(dim=1)
        distances = (norms[:, None] + norms[None, :] - 2 * features @ features.t()).clamp(min=eps)
    if not squared:
        distances = distances.sqrt()
    distances = distances * (1 - torch.eye(len(features), device=features.device, dtype=features.dtype))
    count = (distances > 0).sum().clamp(min=1)
    return distances / (distances.sum() / count)


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational KD, angles (arXiv 1904.05068, eq. 9): smooth L1 of the cosines of all B^3 triplets.

    Args:
        student: features (B, D_s).
        teacher: features (B, D_t).

    Raises:
        ValueError: fewer than two samples.
    """
    require_batch(student, "RKD")
    return F.smooth_l1_loss(_angles(full_precision(student)), _angles(full_precision(teacher.detach())))


def _angles(features: Tensor) -> Tensor:
    """Cos of the angle at i between j and k, (B, B, B)."""
    directions = F.normalize(features[None, :, :] - features[:, None, :], dim=2)  # (vertex, other, D)
    with _uncast(features):
        return torch.einsum("ijd,ikd->ijk", directions, directions)


def require_batch(features: Tensor, criterion: str) -> None:
    """Refuse a batch in which samples cannot be related.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(
            f"{criterion} relates samples to one another: it needs batches of at least 2, got 1."
        )


def full_precision(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _uncast(tensor: Tensor) -> torch.autocast:
    """Matrix products of a loss stay in float32 inside the run's autocast."""
    return torch.autocast(tensor.device.type, enabled=False)
