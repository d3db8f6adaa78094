"""Criteria that read logits only: KD, BKD, DKD, DIST."""

from typing import Any

from torch import Tensor

from callbacks.distillation.criterion import Criterion
from callbacks.distillation.functional import bkd_loss, dist_loss, dkd_loss, kd_loss
from callbacks.distillation.taps import Features
from lightning_modules.parts.distributed import gather_with_gradient


class KD(Criterion):
    """T^2 KL(teacher || student) of softened probabilities (Hinton et al., arXiv 1503.02531).

    Args:
        weight: of the term.
        temperature: T.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = _positive(temperature, "KD.temperature")

    def settings(self) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`kd`."""
        return {"kd": self.weight * kd_loss(student.logits, teacher.logits, self.temperature)}


class BKD(Criterion):
    """Binary cross entropy of each student logit with the teacher's softmax (OFA-KD's code).

    Args:
        weight: of the term.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`bkd`."""
        return {"bkd": self.weight * bkd_loss(student.logits, teacher.logits)}


class DKD(Criterion):
    """Decoupled KD: target and non-target parts with weights of their own (Zhao et al., arXiv 2203.08679).

    Args:
        weight: of the term.
        alpha: weight of the target-class part.
        beta: weight of the non-target part.
        temperature: T.
    """

    def __init__(
        self, weight: float = 1.0, alpha: float = 1.0, beta: float = 2.0, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = weight
        self.alpha = alpha
        self.beta = beta
        self.temperature = _positive(temperature, "DKD.temperature")

    def settings(self) -> dict[str, Any]:
        """Alpha, beta and the temperature."""
        return {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`dkd`."""
        loss = dkd_loss(
            student.logits, teacher.logits, batch["label"], self.alpha, self.beta, self.temperature
        )
        return {"dkd": self.weight * loss}


class DIST(Criterion):
    """Pearson correlation within samples and within classes (Huang et al., arXiv 2205.10536).

    Args:
        weight: of the term.
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation, which spans the batch.
        temperature: tau.
        gather: relate the samples of all ranks instead of the local batch (the authors take the local one).
    """

    def __init__(
        self,
        weight: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.beta = beta
        self.gamma = gamma
        self.temperature = _positive(temperature, "DIST.temperature")
        self.gather = gather

    def settings(self) -> dict[str, Any]:
        """Beta, gamma and the temperature."""
        return {"beta": self.beta, "gamma": self.gamma, "temperature": self.temperature}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`dist`."""
        s, t = student.logits, teacher.logits
        if self.gather:
            s, t = gather_with_gradient(s), gather_with_gradient(t)
        return {"dist": self.weight * dist_loss(s, t, self.beta, self.gamma, self.temperature)}


def _positive(value: float, option: str) -> float:
    if value <= 0:
        raise ValueError(f"{option}: must be positive, got {value}.")
    return value
