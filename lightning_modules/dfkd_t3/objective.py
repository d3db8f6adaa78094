"""What the generator is trained for: the terms of section 2.3 and their weights."""

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.dfkd_t3.bridge import WrittenText, sum_of_tokens
from lightning_modules.dfkd_t3.losses import (
    Divergence,
    anchor_loss,
    bags,
    content_loss,
    divergence,
    full,
    label_specificity,
    negative_entropy,
    onehot_specificity,
    pairwise_cosine,
)
from lightning_modules.parts.distributed import gather_with_gradient
from lightning_modules.parts.options import check_choice, check_range

Specificity = Literal["onehot", "label"]


@dataclass(frozen=True)
class Weights:
    """Of the generator's terms; the defaults are the reconstruction's own.

    Args:
        specificity: the teacher is sure of what is written.
        balance: all classes are written.
        adversarial: teacher and student disagree on it.
        token: many different tokens are written; without it the generator collapses.
        pairwise: texts differ from each other.
        content: what is written stays near to what was read.

    Raises:
        OptionError: a weight is negative.
    """

    specificity: float = 1.0
    balance: float = 1.0
    adversarial: float = 1.0
    token: float = 1.0
    pairwise: float = 0.0
    content: float = 0.1

    def __post_init__(self) -> None:
        for item in fields(self):
            check_range(f"objective.weights.{item.name}", getattr(self, item.name), "[0, inf)")

    @property
    def any(self) -> bool:
        """Whether one of them is above 0."""
        return any(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class GeneratorObjective:
    """The generator's loss L_G.

    Args:
        weights: of the terms.
        spec: specificity: `onehot`, the teacher is sure of any class, or `label`, of the one that the
            generator was asked for.
        divergence: D of the adversarial term.
        temperature: T_kd, of D and of the student's loss.
        adv_clip: largest D of a sample; the divergences of Kullback and Leibler know no bound.
        gather_stats: balance and diversity are of the batch of all ranks, not of each rank's own.

    Raises:
        OptionError: a value is out of its range.
    """

    weights: Weights = field(default_factory=Weights)
    spec: Specificity = "onehot"
    divergence: Divergence = "kl"
    temperature: float = 1.0
    adv_clip: float = 10.0
    gather_stats: bool = True

    def __post_init__(self) -> None:
        check_choice("objective.spec", self.spec, Specificity)
        check_choice("objective.divergence", self.divergence, Divergence)
        check_range("objective.temperature", self.temperature, "(0, inf)")
        check_range("objective.adv_clip", self.adv_clip, "(0, inf)")

    def terms(
        self,
        weights: Weights,
        teacher: Tensor,
        student: Tensor,
        text: WrittenText,
        source: WrittenText,
        reference: Tensor | None = None,
        types: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms by name; those of weight 0 are left out.

        Args:
            weights: of this mode.
            teacher: logits (B, C), or (N, C) of N tokens, on what was written; with a graph.
            student: likewise.
            text: what was written.
            source: what it was made of.
            reference: logits (B, L, V) of the first generator, see `anchor_loss`; None: content against the
                source itself.
            types: (C, K), which entity type each class is of; None where classes count themselves.
        """
        assert text.probabilities is not None
        assert text.logits is not None
        terms: dict[str, Tensor] = {}
        if weights.specificity:
            asked = self.spec == "label" and text.labels is not None
            terms["specificity"] = (
                label_specificity(teacher, text.labels) if asked else onehot_specificity(teacher)  # type: ignore[arg-type]
            )
        if weights.balance:
            terms["balance"] = negative_entropy(self.mean_classes(teacher, types))
        if weights.adversarial:
            distance = divergence(teacher, student, self.divergence, self.temperature, self.adv_clip)
            terms["adversarial"] = -distance
        if weights.token:
            terms["token"] = negative_entropy(self.mean_tokens(text.probabilities, text.mask))
        if weights.pairwise:
            own = bags(text.probabilities, text.mask)
            terms["pairwise"] = pairwise_cosine(gather_with_gradient(own) if self.gather_stats else own)
        if weights.content:
            terms["content"] = (
                content_loss(text.logits, source.ids, source.mask)
                if reference is None
                else anchor_loss(text.logits, reference, text.mask)
            )
        return {name: getattr(weights, name) * value for name, value in terms.items()}

    def mean_classes(self, teacher: Tensor, types: Tensor | None = None) -> Tensor:
        """The mean pbar (C,), or (K,) of entity types among the tokens that are of one, over all ranks."""
        p = full(teacher).softmax(dim=-1)
        if types is not None:
            sums = (p @ types.to(p.dtype)).sum(dim=0)
            sums = self._over_ranks(sums)
            return sums / sums.sum()
        return self._over_ranks(torch.cat([p.sum(dim=0), p.new_tensor([len(p)])]), counted=True)

    def mean_tokens(self, probabilities: Tensor, mask: Tensor) -> Tensor:
        """The mean mu (V,) of pi over the valid positions of all ranks."""
        sums = sum_of_tokens(probabilities, mask)
        return self._over_ranks(torch.cat([sums, mask.sum().to(sums.dtype).unsqueeze(0)]), counted=True)

    def _over_ranks(self, sums: Tensor, counted: bool = False) -> Tensor:
        """Sums of all ranks; divided by their last entry where that is a count."""
        if self.gather_stats:
            sums = gather_with_gradient(sums.unsqueeze(0)).sum(dim=0)
        return sums[:-1] / sums[-1] if counted else sums
