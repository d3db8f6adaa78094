"""DistillationTeacher: the callback that brings a classifier as teacher, and criteria, into a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from callbacks.distillation.base import Teacher
from callbacks.distillation.criterion import Criterion, TrainingSet
from callbacks.distillation.frozen_teacher import ClassifierTeacher, build_teacher, own_statistics
from callbacks.distillation.ofa import OFA
from callbacks.distillation.taps import FeatureShapes, NetworkTaps
from lightning_modules.base import Method
from lightning_modules.parts.contracts import (
    HasDatasets,
    HasImageSize,
    HasIndices,
    HasLabels,
    HasTargets,
    datamodule_of,
    optional,
)
from lightning_modules.parts.frozen import evaluating
from lightning_modules.parts.inference import image_network


class DistillationTeacher(Teacher):
    """Distils a frozen teacher into the run's classifier; the student itself stays as it is.

    Adds the criteria's terms to the module's own loss (whose share is `model.init_args.loss_weight`). Student
    features come from hooks on its one forward pass; the teacher runs in inference mode, in the run's
    precision, on exactly the batch that the student saw, once for all criteria and all callbacks that name
    the same teacher.

    Example:
        >>> DistillationTeacher("swin_tiny_patch4_window7_224", weights="swin.pth", criterion=OFA(gamma=1.2))
        >>> DistillationTeacher("resnet50.a1_in1k", criterion=[OFA(), FitNet()])

    Args:
        teacher: timm name, or any network with normalised images in and logits out; None if `weights` is one
            of our checkpoints, which knows its model.
        weights: `pretrained` (timm's own), a checkpoint file, or None for random; a network keeps what it
            came with unless a file is named.
        criterion: one, or a list that shares the teacher.
        name: of the objective; None takes the criteria's names. Terms are logged as `train/<name>/<term>`.
        teacher_args: further arguments of timm's model for the teacher (`img_size`, ...).
        renormalize_for_teacher: give the teacher images normalised as it is used to. The authors feed it what
            the student sees, which is the default.
        compile_teacher: `torch.compile` the teacher.
        image_size: side of the square training images, pixels; None asks the data module, then the student.
        student_taps: module paths of the student's four stage ends; None finds them.
        teacher_taps: the same for the teacher.

    Raises:
        ValueError: two criteria of one kind, or nothing to build the teacher from.
    """

    def __init__(
        self,
        teacher: str | nn.Module | None = None,
        weights: str | Path | None = "pretrained",
        criterion: Criterion | list[Criterion] | None = None,
        name: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        renormalize_for_teacher: bool = False,
        compile_teacher: bool = False,
        image_size: int | None = None,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        criteria = criterion if isinstance(criterion, list) else [OFA() if criterion is None else criterion]
        labels = [c.label for c in criteria]
        if not criteria or len(set(labels)) != len(labels):
            raise ValueError(
                f"DistillationTeacher.criterion: give one or several of different kinds, got {labels}."
            )
        if teacher is None and weights in (None, "pretrained"):
            raise ValueError(
                "DistillationTeacher: give `teacher`, or `weights` that name a checkpoint of Featherlight."
            )
        super().__init__(name or "_".join(labels))
        self.teacher = teacher
        self.weights = weights
        self.criteria = criteria
        self.teacher_args = teacher_args or {}
        self.renormalize_for_teacher = renormalize_for_teacher
        self.compile_teacher = compile_teacher
        self.image_size = image_size
        self.student_taps = student_taps
        self.teacher_taps = teacher_taps
        self._taps: NetworkTaps | None = None

    # Building

    def student(self, module: LightningModule) -> nn.Module:
        """The module's classifier."""
        return image_network(module, "DistillationTeacher distils into classifiers")

    def build_teacher(self, module: LightningModule) -> ClassifierTeacher:
        """The teacher of timm, of a file or of the user."""
        network, name = build_teacher(self.teacher, self.weights, self.teacher_args, _class_count(module))
        statistics = own_statistics(network, name) if self.renormalize_for_teacher else None
        frozen = ClassifierTeacher(network, name, self.teacher_taps, statistics)
        if self.compile_teacher:
            network.compile()
        return frozen

    @property
    def source(self) -> tuple[Any, ...]:
        """Network, weights, and how the teacher is asked."""
        teacher = id(self.teacher) if isinstance(self.teacher, nn.Module) else self.teacher
        options = (self.renormalize_for_teacher, self.compile_teacher, repr(self.teacher_taps))
        return (teacher, str(self.weights), repr(self.teacher_args), *options)

    @property
    def frozen(self) -> ClassifierTeacher:
        """The teacher, once `setup` has built it."""
        frozen = super().frozen
        assert isinstance(frozen, ClassifierTeacher)
        return frozen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook the student, and build what is not built yet."""
        if stage != "fit":
            return
        self._taps = NetworkTaps(self.student(pl_module), self.student_taps, "student", training_only=True)
        self._taps.watch(self._needed("stages"), self._penultimate)
        super().setup(trainer, pl_module, stage)
        self.objective.bind(self._taps, self.frozen)
        self._keep_from_ddp(pl_module)

    def build_objective(self, trainer: Trainer, module: Method) -> nn.Module:
        """The criteria, built for the shapes that a dry run finds."""
        assert self._taps is not None
        student, teacher = self.student(module), self.frozen.network
        self.frozen.taps.watch(self._needed("teacher_stages"), self._penultimate)
        size = self.image_size or _image_size(trainer, student)
        _check_fixed_size(teacher, self.frozen.name, size)
        student_shapes = _dry_run(student, self._taps, size)
        teacher_shapes = _dry_run(teacher, self.frozen.taps, size)
        if student_shapes.num_classes != teacher_shapes.num_classes:
            raise ValueError(
                f"The student {type(student).__name__} has {student_shapes.num_classes} classes, the teacher "
                f"{self.frozen.name} has {teacher_shapes.num_classes}: distillation needs the same."
            )
        data = _training_set(trainer) if any(c.sample_index for c in self.criteria) else TrainingSet()
        for criterion in self.criteria:
            criterion.build(student_shapes, teacher_shapes, data)
        return DistillationObjective(self.criteria)

    @property
    def objective(self) -> "DistillationObjective":
        """The criteria as the module sees them, once `setup` has built them."""
        assert isinstance(self._objective, DistillationObjective)
        return self._objective

    def _needed(self, attribute: Literal["stages", "teacher_stages"]) -> list[int]:
        return sorted({stage for criterion in self.criteria for stage in getattr(criterion, attribute)})

    @property
    def _penultimate(self) -> bool:
        return any(criterion.penultimate for criterion in self.criteria)

    def _keep_from_ddp(self, module: LightningModule) -> None:
        """Banks that every rank updates alike need no broadcast in every step."""
        if not any(criterion.unsynchronised_buffers() for criterion in self.criteria):
            return
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        prefix = f"objectives.{self.name}.criteria"
        for criterion in self.criteria:
            ignored |= {f"{prefix}.{criterion.label}.{name}" for name in criterion.unsynchronised_buffers()}
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module, list(ignored)
        )

    # The run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the teacher to the run's device and precision, and the criteria's banks to one state."""
        super().on_fit_start(trainer, pl_module)
        for criterion in self.criteria:
            criterion.synchronise()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind: neither the batch nor hooks."""
        super().on_exception(trainer, pl_module, exception)
        self._unhook()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off the student, and the teacher off the device."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._unhook()

    def forget(self) -> None:
        """Release the batch, the teacher's features and the student's."""
        super().forget()
        if self._taps is not None:
            self._taps.clear()

    def _unhook(self) -> None:
        if self._taps is not None:
            self._taps.remove()
            self._taps = None

    def settings(self) -> dict[str, Any]:
        """Every criterion's settings."""
        return {"methods": {criterion.label: criterion.settings() for criterion in self.criteria}}


class DistillationObjective(nn.Module):
    """The criteria as a part of the module's training loss; holds student taps and teacher without owning
    them.

    Args:
        criteria: built ones; their parameters and buffers become this module's.
    """

    _taps: NetworkTaps
    _teacher: ClassifierTeacher

    def __init__(self, criteria: list[Criterion]) -> None:
        super().__init__()
        self.criteria = nn.ModuleDict({criterion.label: criterion for criterion in criteria})

    def bind(self, taps: NetworkTaps, teacher: ClassifierTeacher) -> None:
        """Set where features come from."""
        self._taps = taps
        self._teacher = teacher

    def forward(
        self, module: Method, batch: dict[str, Any], outputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Terms of all criteria; with several of them `<criterion>_<term>` unless both are called alike."""
        student = self._taps.collect(outputs["logits"])
        images = batch["image"]
        teacher = self._teacher.features(images, module.normalize)  # type: ignore[arg-type]
        terms: dict[str, Tensor] = {}
        for label, criterion in self.criteria.items():
            for term, value in criterion(student, teacher, batch).items():
                alone = len(self.criteria) == 1 or term == label
                terms[term if alone else f"{label}_{term}"] = value
        return terms


def _class_count(module: LightningModule) -> int:
    return int(module.num_classes)  # type: ignore[arg-type]


def _image_size(trainer: Trainer, student: nn.Module) -> int:
    """Side of the training images: the data module's, the one a student is fixed to, or timm's for the
    student.

    Raises:
        ValueError: nobody knows.
    """
    data = optional(datamodule_of(trainer), HasImageSize)
    candidates = (
        None if data is None else data.image_size,
        _fixed_size(student),
        (getattr(student, "pretrained_cfg", None) or {}).get("input_size"),
    )
    for candidate in candidates:
        if candidate is not None:
            return int(candidate if isinstance(candidate, (int, float)) else candidate[-1])
    raise ValueError(
        "DistillationTeacher.image_size: neither data nor student tell the size of the images; set it."
    )


def _fixed_size(network: nn.Module) -> tuple[int, int] | None:
    """Height and width of the only images that a timm network takes; None if it takes several."""
    for module in network.modules():
        if isinstance(module, PatchEmbed) and module.img_size is not None and module.strict_img_size:
            return int(module.img_size[0]), int(module.img_size[1])
    return None


def _check_fixed_size(teacher: nn.Module, name: str, size: int) -> None:
    fixed = _fixed_size(teacher)
    if fixed not in (None, (size, size)):
        raise ValueError(
            f"The teacher {name} takes images of {fixed[0]}x{fixed[1]}, the run has {size}x{size}. Change "
            f"data.image_size, or build it for them: teacher_args: {{img_size: {size}}}."
        )


@torch.no_grad()
def _dry_run(network: nn.Module, taps: NetworkTaps, size: int) -> FeatureShapes:
    """Shapes at the taps for a black image; neither batch statistics nor modes nor random state change."""
    parameter = next(network.parameters())
    images = parameter.new_zeros(1, 3, size, size)
    with evaluating(network), taps.always(), torch.compiler.set_stance("force_eager"):
        return taps.shapes(taps.collect(network(images)))


def _training_set(trainer: Trainer) -> TrainingSet:
    """Size and labels of the data module's training set, as far as they are known."""
    datamodule = datamodule_of(trainer)
    if datamodule is None:
        return TrainingSet()
    data = optional(datamodule, HasDatasets)
    dataset = None if data is None else data.datasets.get("train")
    if dataset is None:
        dataset = getattr(datamodule.train_dataloader(), "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        return TrainingSet()
    labelled, targeted = optional(dataset, HasLabels), optional(dataset, HasTargets)
    labels: Any = None
    if labelled is not None:
        labels = labelled.labels
    elif targeted is not None:
        labels = targeted.targets
    chosen = optional(dataset, HasIndices)
    if labels is not None and len(labels) != len(dataset) and chosen is not None:
        labels = torch.as_tensor(labels)[torch.as_tensor(chosen.indices)]
    if labels is None or len(labels) != len(dataset):
        return TrainingSet(len(dataset))
    return TrainingSet(len(dataset), torch.as_tensor(labels, dtype=torch.int64))
