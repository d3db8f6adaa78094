"""FitNet: hints on the features of every stage, between any two families (Romero et al., arXiv 1412.6550)."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.distillation.criterion import Criterion, TrainingSet, checked_stages
from callbacks.distillation.functional import fitnet_loss
from callbacks.distillation.taps import Features, FeatureShapes


class FitNet(Criterion):
    """Sum over stages of MSE(conv1x1(student map), teacher map).

    The code of OFA-KD allows CNN pairs only. For mixed families, as its authors advise: prefix tokens are
    dropped, tokens become a square map, both maps are averaged down to the smaller grid, and a 1x1
    convolution without bias takes the student's channels to the teacher's.

    Args:
        weight: of the term.
        stages: of 1..4, the same for student and teacher.
    """

    def __init__(self, weight: float = 1.0, stages: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__()
        if not stages:
            raise ValueError("FitNet.stages: give at least one stage.")
        self.weight = weight
        self.stages = self.teacher_stages = checked_stages(stages, "FitNet.stages")
        self.projector = nn.ModuleDict()
        self._prefix_tokens: dict[int, tuple[int, int]] = {}

    def build(self, student: FeatureShapes, teacher: FeatureShapes, data: TrainingSet) -> None:
        """The projections."""
        for stage in self.stages:
            s, t = student.stages[stage], teacher.stages[stage]
            self.projector[str(stage)] = nn.Conv2d(s.channels, t.channels, 1, bias=False)
            self._prefix_tokens[stage] = (s.prefix_tokens, t.prefix_tokens)

    def settings(self) -> dict[str, Any]:
        """The stages."""
        return {"stages": list(self.stages)}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`fitnet`."""
        losses = []
        for stage in self.stages:
            prefix_s, prefix_t = self._prefix_tokens[stage]
            s, t = as_map(student.stages[stage], prefix_s), as_map(teacher.stages[stage], prefix_t)
            s, t = to_common_grid(s, t)
            losses.append(fitnet_loss(self.projector[str(stage)](s), t))
        return {"fitnet": self.weight * sum(losses[1:], start=losses[0])}


def as_map(feature: Tensor, prefix_tokens: int = 0) -> Tensor:
    """A map (B, C, H, W) as it is; tokens (B, P + g g, D) without their prefix as (B, D, g, g).

    Raises:
        ValueError: the patch tokens form no square.
    """
    if feature.ndim == 4:
        return feature
    patches = feature[:, prefix_tokens:]
    grid = isqrt(patches.shape[1])
    if grid**2 != patches.shape[1]:
        raise ValueError(f"FitNet: {patches.shape[1]} tokens form no square map.")
    return patches.transpose(1, 2).unflatten(2, (grid, grid))


def to_common_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average both maps (B, C, H, W) down to the smaller height and width of the two."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, size), _pooled(b, size)


def _pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)
