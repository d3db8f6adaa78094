"""Criteria that relate the penultimate features of the samples of a batch: CC and RKD."""

from typing import Any

from torch import Tensor, nn

from callbacks.distillation.criterion import Criterion, TrainingSet
from callbacks.distillation.functional import cc_loss, rkd_angle_loss, rkd_distance_loss
from callbacks.distillation.taps import Features, FeatureShapes
from lightning_modules.parts.distributed import gather_with_gradient


class Embedding(nn.Module):
    """A linear map of penultimate features.

    Args:
        width: in.
        dimension: out.
    """

    def __init__(self, width: int, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dimension)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B, dimension)."""
        return self.linear(x)


class CC(Criterion):
    """Correlation congruence (Peng et al., arXiv 1904.01802) in mdistiller's form, see `cc_loss`.

    Args:
        weight: of the term.
        dimension: of the two trained embeddings.
        gather: relate the samples of all ranks instead of the local batch (the authors take the local one).
    """

    penultimate = True

    def __init__(self, weight: float = 0.02, dimension: int = 128, gather: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.dimension = dimension
        self.gather = gather

    def build(self, student: FeatureShapes, teacher: FeatureShapes, data: TrainingSet) -> None:
        """The embeddings; the teacher's is trained too."""
        self.embed_s = Embedding(student.penultimate, self.dimension)
        self.embed_t = Embedding(teacher.penultimate, self.dimension)

    def settings(self) -> dict[str, Any]:
        """The dimension."""
        return {"dimension": self.dimension}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`cc`."""
        s, t = self.embed_s(student.penultimate), self.embed_t(teacher.penultimate)
        if self.gather:
            s, t = gather_with_gradient(s), gather_with_gradient(t)
        return {"cc": self.weight * cc_loss(s, t)}


class RKD(Criterion):
    """Relational KD: distances and angles between samples (Park et al., arXiv 1904.05068).

    Memory grows with the cube of the batch (B^3 angles), with `gather` of the global batch.

    Args:
        distance_weight: of the term of pairs.
        angle_weight: of the term of triplets; 0 leaves it out.
        squared: compare squared distances.
        gather: relate the samples of all ranks instead of the local batch (the authors take the local one).
    """

    penultimate = True

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if distance_weight == 0 and angle_weight == 0:
            raise ValueError("RKD has no term left: distance_weight and angle_weight are both 0.")
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.squared = squared
        self.gather = gather

    def settings(self) -> dict[str, Any]:
        """Whether distances are squared."""
        return {"squared": self.squared}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`distance` and `angle`."""
        s, t = student.penultimate, teacher.penultimate
        assert s is not None
        assert t is not None
        if self.gather:
            s, t = gather_with_gradient(s), gather_with_gradient(t)
        terms = {}
        if self.distance_weight:
            terms["distance"] = self.distance_weight * rkd_distance_loss(s, t, self.squared)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * rkd_angle_loss(s, t)
        return terms
