"""Distillation between detectors: what the teacher finds is assigned to the student's queries."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from callbacks.distillation.base import FrozenTeacher, Teacher
from lightning_modules.base import Method
from lightning_modules.deco.losses import (
    SetCriterion,
    assign,
    assignment_costs,
    box_losses,
    mean_object_count,
    pad_targets,
)
from lightning_modules.deco.network import DetectionNetwork, network_images
from lightning_modules.deco.released import load_detector
from lightning_modules.parts.normalize import register_normalization


class DetectionTeacher(Teacher):
    """Distils a frozen detector into the run's detector, which may be of another size or kind.

    The queries of two detectors are in no common order, so their logits cannot be compared place by place.
    What the teacher finds with some confidence is assigned to the student's queries as ground truth is, and
    each of these queries learns the teacher's box and its probabilities of all classes (the matched part of
    DETRDistill, Chang et al., ICCV 2023, without its features and its query prior).

    Args:
        teacher: network; its labels must be the student's.
        weights: of the teacher, a detector's checkpoint, the authors' or ours; None keeps what it has.
        name: of the objective; terms are logged as `train/<name>/class`, `.../bbox` and `.../giou`.
        min_score: least probability of its best class for which a box of the teacher counts.
        class_weight: weight of the binary cross-entropy with the teacher's probabilities.
        bbox_weight: weight of the L1 loss.
        giou_weight: weight of the GIoU loss.
    """

    def __init__(
        self,
        teacher: DetectionNetwork,
        weights: str | Path | None = None,
        name: str = "detection_teacher",
        min_score: float = 0.3,
        class_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
    ) -> None:
        super().__init__(name)
        if not 0 <= min_score < 1:
            raise ValueError(f"DetectionTeacher: min_score is in [0, 1), not {min_score}.")
        self.weights = weights
        self.min_score = min_score
        self.term_weights = {"class": class_weight, "bbox": bbox_weight, "giou": giou_weight}
        self._network = teacher

    def student(self, module: LightningModule) -> DetectionNetwork:
        """The run's detector."""
        network, criterion = getattr(module, "network", None), getattr(module, "criterion", None)
        if not isinstance(network, DetectionNetwork) or not isinstance(criterion, SetCriterion):
            raise MisconfigurationException(
                f"DetectionTeacher distils into detectors such as DecoDetector's, not "
                f"{type(module).__name__}."
            )
        return network

    def build_teacher(self, module: LightningModule) -> FrozenTeacher:
        """The detector with its weights."""
        student = self.student(module)
        if student.num_classes != self._network.num_classes:
            raise MisconfigurationException(
                f"DetectionTeacher: the teacher has {self._network.num_classes} classes, the student "
                f"{student.num_classes}; both must mean the same labels."
            )
        if self.weights is not None:
            load_detector(self._network, self.weights)
        return FrozenTeacher(self._network, type(self._network).__name__, "logits or boxes")

    @property
    def source(self) -> tuple[Any, ...]:
        """Network and weights."""
        return (id(self._network), str(self.weights))

    def build_objective(self, trainer: Trainer, module: Method) -> nn.Module:
        """The matched terms."""
        return SetDistillation(self.frozen, self.min_score, self.term_weights)

    def settings(self) -> dict[str, Any]:
        """Which of the teacher's boxes count."""
        return {"min_score": self.min_score}


class SetDistillation(nn.Module):
    """The objective of `DetectionTeacher`; has no parameters, and does not own the teacher."""

    mean: Tensor
    std: Tensor

    def __init__(self, teacher: FrozenTeacher, min_score: float, weights: dict[str, float]) -> None:
        super().__init__()
        self._teacher = teacher
        network: Any = teacher.network
        register_normalization(self, network.mean, network.std)
        self.min_score = min_score
        self.weights = weights

    def _ask(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self._teacher(network_images(batch["image"], self.mean, self.std, batch.get("mask")))

    def forward(self, module: Any, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted `class`, `bbox` and `giou` of the last layer, per box that the teacher found."""
        wanted = self._teacher.once(batch["image"], lambda: self._ask(batch))
        probabilities, boxes = wanted["logits"].float().sigmoid(), wanted["boxes"].float()
        best, labels = probabilities.max(dim=-1)  # (batch, queries)
        found = [scores > self.min_score for scores in best]
        targets = pad_targets(
            [image[kept] for image, kept in zip(labels, found, strict=True)],
            [image[kept] for image, kept in zip(boxes, found, strict=True)],
            probabilities.shape[-1],
        )
        soft = pad_sequence([p[kept] for p, kept in zip(probabilities, found, strict=True)], batch_first=True)
        logits, own = outputs["logits"].float()[None], outputs["boxes"].float()[None]  # one layer
        assignment = assign(assignment_costs(logits, own, targets, module.criterion.costs), targets.counts)
        matched = logits[assignment.layer, assignment.image, assignment.query]  # (pairs, classes)
        classes = F.binary_cross_entropy_with_logits(
            matched, soft[assignment.image, assignment.object], reduction="sum"
        )
        distance, giou = box_losses(own, targets, assignment)
        count = mean_object_count(sum(targets.counts), logits.device)
        terms = {"class": classes, "bbox": distance.sum(), "giou": giou.sum()}
        return {name: self.weights[name] * value / count for name, value in terms.items()}
