"""Scores of pictures and texts by matching patches and words (section 2.4)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.lightclip.assignment import assign
from lightning_modules.parts.options import check, check_choice

Mode = Literal["relaxed", "bidirectional", "sinkhorn"]


class Matching(NamedTuple):
    """Which reading of "relaxed bipartite matching" a run uses; the paper's own is not known.

    Args:
        mode: `relaxed`: see `capacity`; `bidirectional`: FILIP; `sinkhorn`: an entropic plan.
        capacity: words that a patch takes at most. None: each word its best patch, half of FILIP; 1:
            one-to-one, as a later paper describes it.
        pairs: `all`, or `positives`: a finite capacity binds only pictures and texts that belong together,
            and the negatives are scored without it.
        epsilon: of sinkhorn.
        iterations: of sinkhorn.
        budget: bytes of cosines that are held at once; more are computed in chunks of pictures, and again in
            the backward pass.
    """

    mode: Mode = "relaxed"
    capacity: int | None = None
    pairs: Literal["all", "positives"] = "all"
    epsilon: float = 0.05
    iterations: int = 5
    budget: int = 1 << 28

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            OptionError: naming the option.
        """
        check_choice("matching.mode", self.mode, Mode)
        check_choice("matching.pairs", self.pairs, Literal["all", "positives"])
        check(self.capacity is None or self.capacity >= 1, "matching.capacity", self.capacity, "null or >= 1")
        finite_only = self.capacity is None or self.mode == "relaxed"
        check(finite_only, "matching.capacity", self.capacity, f"null with matching.mode: {self.mode}")
        check(self.epsilon > 0, "matching.epsilon", self.epsilon, "positive")
        check(self.iterations >= 1, "matching.iterations", self.iterations, "at least 1")

    def describe(self) -> str:
        """In words, for the log."""
        if self.mode == "bidirectional":
            return "FILIP's token-wise maximum in both directions"
        if self.mode == "sinkhorn":
            return f"an entropic plan (epsilon {self.epsilon:g}, {self.iterations} iterations)"
        if self.capacity is None:
            return "each word its best patch (half of FILIP)"
        once = (
            "one-to-one, as a later paper describes it"
            if self.capacity == 1
            else (f"at most {self.capacity} words a patch")
        )
        return once + (", for pairs that belong together only" if self.pairs == "positives" else "")


def token_scores(
    patches: Tensor, words: Tensor, valid: Tensor, matching: Matching = Matching()
) -> tuple[Tensor, Tensor]:
    """Scores (images, texts) for the rows of images and for those of texts; 0 where a text has no word.

    Args:
        patches: (images, P, width), of unit length.
        words: (texts, length, width), of unit length.
        valid: (texts, length), whether a position is a word.
        matching: how they are matched.
    """
    lengths = valid.sum(1)
    longest = max(int(lengths.max()), 1)
    order = (~valid).int().argsort(dim=1, stable=True)[:, :longest]
    words = words.gather(1, order.unsqueeze(-1).expand(-1, -1, words.shape[-1]))
    valid = valid.gather(1, order)
    each = len(words) * patches.shape[1] * longest * patches.element_size()
    chunk = max(1, matching.budget // each)
    if chunk >= len(patches):
        return _scores(patches, words, valid, matching, 0)
    parts = [
        checkpoint(_scores, patches[at : at + chunk], words, valid, matching, at, use_reentrant=False)
        for at in range(0, len(patches), chunk)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _scores(
    patches: Tensor, words: Tensor, valid: Tensor, matching: Matching, at: int
) -> tuple[Tensor, Tensor]:
    cosine = torch.einsum("ipd,jwd->ijpw", patches, words)
    lengths = valid.sum(1)
    if matching.mode == "sinkhorn":
        score = (sinkhorn_plan(cosine.detach(), valid, matching.epsilon, matching.iterations) * cosine).sum(
            (2, 3)
        )
        return score, score
    relaxed = (cosine.amax(2) * valid).sum(-1) / lengths.clamp(min=1)
    if matching.mode == "bidirectional":
        best = cosine.masked_fill(~valid[None, :, None], -torch.inf).amax(3)
        by_patch = torch.where((lengths > 0)[None], best.mean(2), torch.zeros_like(relaxed))
        return by_patch, relaxed
    if matching.capacity is None:
        return relaxed, relaxed
    if matching.pairs == "positives":
        count = len(patches)
        row = torch.arange(count, device=cosine.device)
        own = assigned_score(cosine[row, row + at], lengths[at : at + count], matching.capacity)
        score = relaxed.index_put((row, row + at), own)
    else:
        every = lengths.expand(len(patches), -1).flatten()
        score = assigned_score(cosine.flatten(0, 1), every, matching.capacity).view_as(relaxed)
    return score, score


def assigned_score(cosine: Tensor, lengths: Tensor, capacity: int) -> Tensor:
    """Mean cosine (problems,) of the matched pairs of the best assignment, which has no gradient.

    Args:
        cosine: (problems, patches, words).
        lengths: valid words (problems,).
        capacity: words that a patch takes at most.
    """
    patch = assign(cosine, lengths, capacity)
    matched = patch >= 0
    chosen = cosine.gather(1, patch.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (chosen * matched).sum(1) / matched.sum(1).clamp(min=1)


def sinkhorn_plan(cosine: Tensor, valid: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic plan (images, texts, patches, words) with uniform marginals; word marginals are exact."""
    kernel = (cosine / epsilon).masked_fill(~valid[None, :, None], -torch.inf)
    empty = ~valid.any(1)
    kernel = kernel.masked_fill(empty[None, :, None, None], 0.0)
    patch_mass = -torch.log(torch.tensor(cosine.shape[2], dtype=cosine.dtype, device=cosine.device))
    word_mass = -valid.sum(1).clamp(min=1).to(cosine.dtype).log()[None, :, None]
    g = torch.zeros_like(kernel[:, :, 0])
    f = torch.zeros_like(kernel[..., 0])
    for _ in range(iterations):
        f = patch_mass - (kernel + g.unsqueeze(2)).logsumexp(3)
        g = word_mass - (kernel + f.unsqueeze(3)).logsumexp(2)
        g = g.masked_fill(~valid[None], 0.0)
    plan = (kernel + f.unsqueeze(3) + g.unsqueeze(2)).exp()
    return plan.masked_fill(empty[None, :, None, None], 0.0)
