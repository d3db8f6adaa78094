"""OFA: distillation across architecture families through exit branches (Hao et al., arXiv 2310.19444)."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.distillation.branches import exit_branches
from callbacks.distillation.criterion import Criterion, TrainingSet, checked_stages
from callbacks.distillation.functional import Variant, ofa_loss
from callbacks.distillation.taps import Features, FeatureShapes, StageShape


class OFA(Criterion):
    """Matches the student's logits, and those of an exit branch at the end of each stage, to the teacher's
    logits.

    kd = kd_weight * L(s, t), ofa = ofa_weight * sum_i L(branch_i(f_i), t), where L is `ofa_loss` with its own
    gamma for every branch and for the final logits (sections 3.2 and 3.3, summed as in the authors' code).

    Args:
        gamma: one exponent for all, or one for each of `stages` and then one for the final logits; above 1
            the target class counts more, below 1 (warned of) less.
        temperature: T of both softmaxes; there is no factor T^2.
        stages: where branches hang, of 1..4; none leaves the final logits alone.
        ofa_weight: weight of the sum over the branches.
        kd_weight: weight of the final logits' term; 0 leaves it out.
        variant: `released` is the authors' code, `paper` their equation 7.

    Raises:
        ValueError: a stage or gamma is out of range or their numbers disagree, or no term is left.
    """

    penultimate = True

    def __init__(
        self,
        gamma: float | list[float] = 1.0,
        temperature: float = 1.0,
        stages: Sequence[int] = (1, 2, 3, 4),
        ofa_weight: float = 1.0,
        kd_weight: float = 1.0,
        variant: Variant = "released",
    ) -> None:
        super().__init__()
        self.stages = checked_stages(stages, "OFA.stages")
        self.gammas = _checked_gammas(gamma, len(self.stages))
        if temperature <= 0:
            raise ValueError(f"OFA.temperature: must be positive, got {temperature}.")
        if kd_weight == 0 and not self.stages:
            raise ValueError("OFA has no term left: kd_weight is 0 and stages is empty.")
        self.temperature = temperature
        self.ofa_weight = ofa_weight
        self.kd_weight = kd_weight
        self.variant: Variant = variant
        self.penultimate = bool(self.stages)
        self.projector = nn.ModuleDict()
        self._shapes: dict[int, StageShape] = {}

    def build(self, student: FeatureShapes, teacher: FeatureShapes, data: TrainingSet) -> None:
        """The exit branches."""
        self._shapes = {stage: student.stages[stage] for stage in self.stages}
        self.projector = exit_branches(
            self._shapes, student.penultimate, teacher.penultimate, student.num_classes
        )

    def settings(self) -> dict[str, Any]:
        """Stages, gammas and the form of the loss."""
        return {"stages": list(self.stages), "gamma": list(self.gammas), "variant": self.variant}

    def branch_logits(self, student: Features) -> dict[int, Tensor]:
        """Logits (B, K) of every branch.

        Raises:
            ValueError: images of another size than at the start give another number of tokens.
        """
        return {stage: self.projector[str(stage)](self._checked(student, stage)) for stage in self.stages}

    def _checked(self, student: Features, stage: int) -> Tensor:
        feature, expected = student.stages[stage], self._shapes[stage]
        if not expected.is_map and feature.shape[1] != expected.length:
            raise ValueError(
                f"OFA: stage {stage} gives {feature.shape[1]} tokens, its branch was built for "
                f"{expected.length}: the images of a run must have one size."
            )
        return feature

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`kd` for the final logits and `ofa` for the branches."""
        terms = {}
        if self.kd_weight:
            terms["kd"] = self.kd_weight * self._loss(student.logits, teacher, batch, self.gammas[-1])
        if self.stages:
            losses = [
                self._loss(logits, teacher, batch, gamma)
                for logits, gamma in zip(self.branch_logits(student).values(), self.gammas, strict=False)
            ]
            terms["ofa"] = self.ofa_weight * sum(losses[1:], start=losses[0])
        return terms

    def _loss(self, logits: Tensor, teacher: Features, batch: dict[str, Tensor], gamma: float) -> Tensor:
        return ofa_loss(logits, teacher.logits, batch["label"], gamma, self.temperature, self.variant)


def _checked_gammas(gamma: float | list[float], stages: int) -> tuple[float, ...]:
    gammas = list(gamma) if isinstance(gamma, (list, tuple)) else [gamma] * (stages + 1)
    if len(gammas) == 1:
        gammas = gammas * (stages + 1)
    if len(gammas) != stages + 1:
        raise ValueError(
            f"OFA.gamma: give one value, or {stages + 1} (for {stages} stages and the final logits); "
            f"got {len(gammas)}."
        )
    if min(gammas) <= 0:
        raise ValueError(f"OFA.gamma: must be positive, got {gammas}.")
    if min(gammas) < 1:
        rank_zero_warn(f"OFA.gamma: {gammas} has values below 1, which weaken the target class.")
    return tuple(gammas)
