"""Criterion: what a distillation method is to `DistillationTeacher`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from callbacks.distillation.taps import STAGES, Features, FeatureShapes


@dataclass(frozen=True)
class TrainingSet:
    """What is known of the training data before it is read.

    Attributes:
        size: number of samples; None if unknown.
        labels: class of every sample (size,); None if the data set does not say.
    """

    size: int | None = None
    labels: Tensor | None = None


class Criterion(nn.Module, ABC):
    """Compares what student and teacher computed for a batch; its trainable parts train along.

    A subclass says in its class or instance attributes what it reads, makes its parameters in `build`, and
    returns named, weighted scalars from `forward`.

    Attributes:
        stages: stage numbers of the student that it reads.
        teacher_stages: the same for the teacher.
        penultimate: whether it reads (or needs the width of) the vectors that enter the classifiers.
        sample_index: whether it reads `batch["index"]` and the size of the training set.
    """

    stages: tuple[int, ...] = ()
    teacher_stages: tuple[int, ...] = ()
    penultimate: bool = False
    sample_index: bool = False

    @property
    def label(self) -> str:
        """Its name in logs and state dicts."""
        return type(self).__name__.lower()

    def build(self, student: FeatureShapes, teacher: FeatureShapes, data: TrainingSet) -> None:
        """Make the parameters and buffers; called once, before the optimiser exists.

        Args:
            student: shapes at the student's taps.
            teacher: shapes at the teacher's taps.
            data: filled in only for criteria with `sample_index`.
        """

    def synchronise(self) -> None:
        """Make state that DDP does not touch equal on all ranks; called once before training."""

    def unsynchronised_buffers(self) -> list[str]:
        """Names of buffers that the criterion keeps equal on all ranks, so that DDP need not."""
        return []

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must share with the interrupted one."""
        return {}

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named, weighted scalar terms.

        Args:
            student: features with graph.
            teacher: features without.
            batch: `label` (B,) or soft (B, K), and `index` (B,) for criteria with `sample_index`.
        """


def checked_stages(stages: Sequence[int], option: str) -> tuple[int, ...]:
    """Distinct stage numbers of 1..4.

    Raises:
        ValueError: a number is out of range or given twice.
    """
    if any(stage not in range(1, STAGES + 1) for stage in stages):
        raise ValueError(f"{option}: stages are numbered 1 to {STAGES}, got {list(stages)}.")
    if len(set(stages)) != len(stages):
        raise ValueError(f"{option}: a stage is given twice in {list(stages)}.")
    return tuple(stages)
