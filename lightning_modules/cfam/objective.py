"""The loss of a global batch, each rank with its own anchors (sections 2.4 to 2.6)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.cfam.losses import (
    Mining,
    cosine,
    hard_negatives,
    itc,
    l2,
    local_similarity,
    sdm,
    weighted_mean,
)
from lightning_modules.parts.distributed import gather, gather_with_gradient, is_distributed
from lightning_modules.parts.options import check, check_choice, check_range

GlobalLoss = Literal["sdm", "itc"]
LocalLoss = Literal["sdm", "itc", "l2"]


@dataclass(frozen=True)
class LossSettings:
    """Which terms there are; a term with weight 0 builds nothing and costs nothing.

    Args:
        global_weight: of the loss on the global features.
        local_weight: of the loss on the query features.
        match_weight: of the matcher's loss on mined pairs.
        cid_weight: of the cross-modal identity loss.
        id_weight: of IRRA's identity loss.
        global_loss: similarity distribution matching, or the contrastive loss.
        local_loss: the same for the query features, or their squared distance (one unverified note).
        temperature: tau.
        mining: of the negatives for matcher and identity loss.
    """

    global_weight: float = 1.0
    local_weight: float = 1.0
    match_weight: float = 1.0
    cid_weight: float = 1.0
    id_weight: float = 0.0
    global_loss: GlobalLoss = "sdm"
    local_loss: LocalLoss = "sdm"
    temperature: float = 0.02
    mining: Mining = "hardest"

    def __post_init__(self) -> None:
        for name in ("global", "local", "match", "cid", "id"):
            check_range(f"{name}_weight", getattr(self, f"{name}_weight"), "[0, inf)")
        check_range("temperature", self.temperature, "(0, inf)")
        check_choice("global_loss", self.global_loss, GlobalLoss)
        check_choice("local_loss", self.local_loss, LocalLoss)
        check_choice("mining", self.mining, Mining)
        weights = (self.global_weight, self.local_weight, self.match_weight, self.cid_weight, self.id_weight)
        check(any(weights), "global_weight", self.global_weight, "above 0 where all other weights are 0")

    @property
    def decodes(self) -> bool:
        """Whether the granularity decoder is needed."""
        return self.local_weight > 0 or self.match_weight > 0


@dataclass
class Sides:
    """Features of this rank's pairs and of all ranks' pairs.

    Args:
        v: image features (B, D).
        t: text features (B, D).
        identity: (B,).
        fv: query features of the images (B, K, D), where there is a decoder.
        ft: of the texts.
    """

    v: Tensor
    t: Tensor
    identity: Tensor
    fv: Tensor | None = None
    ft: Tensor | None = None

    def gathered(self) -> "Sides":
        """The same of all ranks, with gradient."""
        return Sides(
            gather_with_gradient(self.v),
            gather_with_gradient(self.t),
            gather(self.identity),
            None if self.fv is None else gather_with_gradient(self.fv),
            None if self.ft is None else gather_with_gradient(self.ft),
        )


class Objective:
    """Terms of the loss by name, weighted; and what is worth logging of them.

    Args:
        settings: see `LossSettings`.
        matcher: built where its weight is not 0.
        cid_head: built where its weight is not 0.
        classifier: of IRRA's identity loss.
    """

    def __init__(
        self,
        settings: LossSettings,
        matcher: nn.Module | None = None,
        cid_head: nn.Module | None = None,
        classifier: nn.Module | None = None,
    ) -> None:
        self.settings = settings
        self.matcher, self.cid_head, self.classifier = matcher, cid_head, classifier
        self.accuracies: dict[str, Tensor] = {}

    def __call__(self, own: Sides) -> dict[str, Tensor]:
        """`{gs, ls, m, cid, id: scalar}` of this rank's pairs against those of all ranks."""
        settings, everyone = self.settings, own.gathered()
        rank = dist.get_rank() if is_distributed() else 0
        rows = torch.arange(len(own.v), device=own.v.device) + rank * len(own.v)
        same = own.identity[:, None] == everyone.identity[None, :]
        by_image, by_text = cosine(own.v, everyone.t), cosine(own.t, everyone.v)
        hit = same.gather(1, by_image.argmax(dim=1, keepdim=True))
        self.accuracies = {"r1": hit.float().mean()}
        terms = {}
        if settings.global_weight:
            terms["gs"] = settings.global_weight * self._both(
                settings.global_loss, by_image, by_text, same, rows
            )
        if settings.local_weight:
            terms["ls"] = settings.local_weight * self._local(own, everyone, same, rows)
        if settings.match_weight or settings.cid_weight:
            terms |= self._pairs(own, everyone, by_image, by_text, same)
        if settings.id_weight and self.classifier is not None:
            logits = [self.classifier(own.v).float(), self.classifier(own.t).float()]
            both = [F.cross_entropy(each, own.identity) for each in logits]
            terms["id"] = settings.id_weight * (both[0] + both[1]) / 2
        return terms

    def _both(self, kind: str, by_image: Tensor, by_text: Tensor, same: Tensor, rows: Tensor) -> Tensor:
        tau = self.settings.temperature
        if kind == "sdm":
            return sdm(by_image, same, tau) + sdm(by_text, same, tau)
        return (itc(by_image, rows, tau) + itc(by_text, rows, tau)) / 2

    def _local(self, own: Sides, everyone: Sides, same: Tensor, rows: Tensor) -> Tensor:
        assert own.fv is not None
        assert own.ft is not None
        assert everyone.fv is not None
        assert everyone.ft is not None
        if self.settings.local_loss == "l2":
            return l2(own.fv, own.ft)
        by_image = local_similarity(own.fv, everyone.ft)
        by_text = local_similarity(own.ft, everyone.fv)
        return self._both(self.settings.local_loss, by_image, by_text, same, rows)

    def _pairs(
        self, own: Sides, everyone: Sides, by_image: Tensor, by_text: Tensor, same: Tensor
    ) -> dict[str, Tensor]:
        """Matcher and identity loss on B positives, B (image, hardest text), B (hardest image, text)."""
        settings, count = self.settings, len(own.v)
        text, has_text = hard_negatives(by_image, same, settings.mining, settings.temperature)
        image, has_image = hard_negatives(by_text, same, settings.mining, settings.temperature)
        counts = torch.cat([torch.ones_like(has_text), has_text, has_image])
        total = gather(counts.sum()[None]).float().mean()  # the ranks' mean is that of all pairs
        positive = torch.arange(3 * count, device=counts.device) < count
        terms = {}
        if settings.match_weight and self.matcher is not None:
            assert own.fv is not None
            assert own.ft is not None
            assert everyone.fv is not None
            assert everyone.ft is not None
            logits = self.matcher(
                torch.cat([own.fv, own.fv, everyone.fv[image]]),
                torch.cat([own.ft, everyone.ft[text], own.ft]),
            ).float()
            losses = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
            terms["m"] = settings.match_weight * weighted_mean(losses, counts, total)
            right = ((logits > 0) == positive) & counts
            self.accuracies["match_positive"] = right[:count].float().mean()
            negatives = counts[count:].sum().clamp(min=1)
            self.accuracies["match_negative"] = right[count:].sum() / negatives
        if settings.cid_weight and self.cid_head is not None:
            v = torch.cat([own.v, own.v, everyone.v[image]])
            t = torch.cat([own.t, everyone.t[text], own.t])
            logits = self.cid_head(v, t).float(), self.cid_head(t, v).float()
            extra = torch.full_like(own.identity, logits[0].shape[1] - 1)
            target = torch.cat([own.identity, extra, extra])
            both = [F.cross_entropy(each, target, reduction="none") for each in logits]
            terms["cid"] = settings.cid_weight * weighted_mean((both[0] + both[1]) / 2, counts, total)
        return terms
