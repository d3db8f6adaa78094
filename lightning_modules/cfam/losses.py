"""Similarities, mined negatives and losses of CFAM (sections 2.4 to 2.6).

Rows of a similarity are the anchors of this rank, columns the batch of all ranks: `rows` says which global
positions the anchors have. A mean over the rows is the rank's share, and the mean over the ranks the loss of
the whole batch.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
Mining = Literal["hardest", "multinomial", "random"]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (A, B) of features (A, D) and (B, D), in float32."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def local_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(A, B): mean over K of the cosine of query k of both, from (A, K, D) and (B, K, D)."""
    count = a.shape[1]
    a, b = F.normalize(a.float(), dim=-1).flatten(1), F.normalize(b.float(), dim=-1).flatten(1)
    return a @ b.T / count


def sdm(similarity: Tensor, same: Tensor, temperature: float) -> Tensor:
    """One direction of similarity distribution matching: KL of softmax rows from the identities'.

    Args:
        similarity: (A, B).
        same: bool (A, B), whether the identities are equal; every row has one that is.
        temperature: tau.
    """
    wanted = same.float() / same.sum(dim=1, keepdim=True)
    log_p = F.log_softmax(similarity.float() / temperature, dim=1)
    return (log_p.exp() * (log_p - (wanted + EPS).log())).sum(dim=1).mean()


def itc(similarity: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """One direction of the contrastive loss: the pair of anchor i stands in column `rows[i]`."""
    return F.cross_entropy(similarity.float() / temperature, rows)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of normalised features of pairs, (A, K, D) both (one unverified note)."""
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    return (a - b).square().sum(dim=-1).mean()


def hard_negatives(
    similarity: Tensor, same: Tensor, mining: Mining = "hardest", temperature: float = 0.02
) -> tuple[Tensor, Tensor]:
    """A column of another identity for every row that has one.

    Args:
        similarity: (A, B), used without gradient.
        same: bool (A, B).
        mining: the most similar (ties: the lowest column), or drawn by its softmax, or drawn evenly.
        temperature: of the softmax.

    Returns:
        Columns (A,), and bool (A,) whether the row has a negative at all.
    """
    scores = similarity.detach().float().masked_fill(same, -torch.inf)
    exists = ~same.all(dim=1)
    if mining == "hardest":
        best = scores.max(dim=1, keepdim=True).values
        return (scores == best).int().argmax(dim=1), exists
    logits = torch.zeros_like(scores) if mining == "random" else scores / temperature
    logits = logits.masked_fill(same & exists[:, None], -torch.inf)
    logits = logits.masked_fill(~exists[:, None], 0.0)
    return torch.multinomial(logits.softmax(dim=1), 1).squeeze(1), exists


def weighted_mean(values: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Sum of the values (N,) that count, over `total`."""
    return torch.where(weights, values, torch.zeros_like(values)).sum() / total
