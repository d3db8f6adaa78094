"""Losses of images against texts with softened labels, and of patches against words (sections 2.3, 2.4)."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.parts.options import check, check_choice

Soften = Literal["similarity", "uniform"]
Kind = Literal["linear", "cosine", "step", "constant"]


class Softening(NamedTuple):
    """How much of a label the negatives get, over a run.

    Args:
        mode: how they share it: by similarity, or equally.
        temperature: of the similarities; None: that of the logits.
        kind: shape of the rise.
        start: the share at the start, in [0, 1).
        end: at the end, not below `start`.
        hold: part of the run that keeps `start`, in [0, 1).
        stages: of the kind `step`.
        unit: `epoch`: it rises from one epoch to the next; `step`: with every step of the optimiser.
    """

    mode: Soften = "similarity"
    temperature: float | None = None
    kind: Kind = "linear"
    start: float = 0.0
    end: float = 0.2
    hold: float = 0.0
    stages: int = 4
    unit: Literal["epoch", "step"] = "epoch"

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            OptionError: naming the option.
        """
        check_choice("softening.mode", self.mode, Soften)
        check_choice("softening.kind", self.kind, Kind)
        check_choice("softening.unit", self.unit, Literal["epoch", "step"])
        for name, value in (("start", self.start), ("end", self.end), ("hold", self.hold)):
            check(0 <= value < 1, f"softening.{name}", value, "in [0, 1)")
        check(self.end >= self.start, "softening.end", self.end, f"at least softening.start, {self.start}")
        check(self.stages >= 2, "softening.stages", self.stages, "at least 2")

    def alpha(self, done: float) -> float:
        """The share after `done`, in [0, 1], of the run."""
        if self.kind == "constant":
            return self.end
        u = min(max((done - self.hold) / (1 - self.hold), 0.0), 1.0)
        rise = {
            "linear": lambda: u,
            "cosine": lambda: (1 - math.cos(math.pi * u)) / 2,
            "step": lambda: min(math.floor(u * self.stages), self.stages - 1) / (self.stages - 1),
        }[self.kind]()
        return self.start + (self.end - self.start) * rise


def soft_targets(
    cosine: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    alpha: float,
    mode: Soften = "similarity",
    temperature: float | None = None,
) -> Tensor:
    """Targets (rows, columns), without gradient: 1 - alpha at the label, alpha spread over the rest.

    Args:
        cosine: (rows, columns).
        labels: column (rows,) of each row's positive.
        scale: of the logits.
        alpha: what the negatives get together.
        mode: by softmax of their similarities, or equally.
        temperature: of that softmax; None: 1 / scale.
    """
    cosine = cosine.detach()
    positive = F.one_hot(labels, cosine.shape[1]).to(cosine.dtype)
    if cosine.shape[1] == 1:
        return positive
    if mode == "uniform":
        rest = (1 - positive) / (cosine.shape[1] - 1)
    else:
        sharpness = torch.as_tensor(scale).detach() if temperature is None else 1 / temperature
        rest = (cosine * sharpness).masked_fill(positive.bool(), -torch.inf).softmax(1)
    return (1 - alpha) * positive + alpha * rest


def instance_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    alpha: float = 0.0,
    mode: Soften = "similarity",
    temperature: float | None = None,
    all_image: Tensor | None = None,
    all_text: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of images against texts and of texts against images, scalars.

    Args:
        image: (batch, width), normalised here.
        text: (batch, width).
        scale: of the cosines.
        alpha: share of the negatives.
        mode: see `soft_targets`.
        temperature: see `soft_targets`.
        all_image: those of all ranks; None: `image`.
        all_text: those of all ranks; None: `text`.
        offset: place of this rank's first row among them.
    """
    with torch.autocast(image.device.type, enabled=False):
        widened = [
            None
            if value is None
            else F.normalize(value if value.dtype == torch.float64 else value.float(), dim=-1)
            for value in (image, text, all_image, all_text)
        ]
        v, t, all_v, all_t = widened
        assert v is not None
        assert t is not None
        labels = torch.arange(len(image), device=image.device) + offset
        both = []
        for rows, columns in ((v, t if all_t is None else all_t), (t, v if all_v is None else all_v)):
            cosine = rows @ columns.T
            target = soft_targets(cosine, labels, scale, alpha, mode, temperature)
            both.append(-(target * (scale * cosine).log_softmax(1)).sum(1).mean())
    return both[0], both[1]


def token_loss(image_scores: Tensor, text_scores: Tensor, lengths: Tensor, scale: Tensor | float) -> Tensor:
    """Mean of the cross-entropies of images against texts and texts against images, hard labels.

    Args:
        image_scores: (images, texts), whose rows are images.
        text_scores: (images, texts), whose columns are the rows of the other.
        lengths: valid words (texts,); texts without any leave with their images.
        scale: of the scores.
    """
    kept = lengths > 0
    if not bool(kept.any()):
        return 0 * (image_scores.nan_to_num().sum() + text_scores.nan_to_num().sum())
    i2t, t2i = image_scores[kept][:, kept] * scale, text_scores[kept][:, kept].T * scale
    labels = torch.arange(len(i2t), device=i2t.device)
    return (F.cross_entropy(i2t, labels) + F.cross_entropy(t2i, labels)) / 2
