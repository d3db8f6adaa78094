"""GenDet: teacher, adversarial student and augmenter, and the classifier of their discrepancy."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.base import Terms
from lightning_modules.gendet.detector import FakeDetector
from lightning_modules.gendet.losses import Reduction, agreement_loss, check_margin, disagreement_loss
from lightning_modules.gendet.network import Activation, GenDetNet
from lightning_modules.gendet.schedule import LABELS, STAGES, Stage, StageSchedule
from lightning_modules.parts.encoder import ImageEncoder

OPTIMIZERS: dict[Stage, int] = {"teacher": 0, "real": 1, "fake": 1, "augment": 2, "classifier": 3}
"""Which of the four optimisers a stage steps; real and fake epochs share the student's."""


class GenDet(FakeDetector):
    """Detects generated images by where a student disagrees with its teacher (arXiv 2312.08880).

    The stage of an epoch is a pure function of its number, see `StageSchedule`; every stage trains one part
    by its own optimiser, and `trainer.max_epochs` is the schedule's total. Objectives are for one of these
    optimisers, and join the loss of its stages. The validation score is the
    teacher's probability in teacher epochs, the squashed mean discrepancy in the rotations, and the
    classifier's probability from then on.

    Args:
        encoder: frozen, images to features.
        schedule: epochs of the stages, and the ablations.
        dim: width of the blocks.
        heads: of their attention.
        mlp_ratio: hidden width of their MLPs over `dim`.
        norm_first: pre-norm blocks.
        activation: of their MLPs.
        dropout: inside the blocks.
        margin: the paper's M, in (0, 4].
        alpha: weight of the fake loss.
        discrepancy_reduction: of the squared difference over the entries, in the real and augmenter stages.
        classifier_fake_features: what the classifier is trained on: fakes as they are, or augmented.
        detector: what scores in `test` and `predict`: the last classifier, the teacher alone (ablation), or
            the mean discrepancy.
        teacher_lr: learning rate of embedding, teacher and its head.
        student_lr: learning rate of the student.
        augmenter_lr: learning rate of the augmenter; None is the student's.
        classifier_lr: learning rate of the classifier.
        optimizer: class of all four optimisers, AdamW if None; the rates above replace its own.
        weights: a checkpoint of this module to start from.
        standardize: see `FakeDetector`.

    Raises:
        ValueError: `margin` is outside (0, 4], or `dim` is not divisible by `heads`.
    """

    network: GenDetNet
    stage_steps: Tensor
    optimizer_names = ("teacher", "student", "augmenter", "classifier")

    def __init__(
        self,
        encoder: ImageEncoder,
        schedule: StageSchedule = StageSchedule(),
        dim: int = 196,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        norm_first: bool = False,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        margin: float = 2.0,
        alpha: float = 0.1,
        discrepancy_reduction: Reduction = "mean",
        classifier_fake_features: Literal["raw", "augmented"] = "raw",
        detector: Literal["classifier", "teacher", "discrepancy"] = "classifier",
        teacher_lr: float = 1e-5,
        student_lr: float = 1e-4,
        augmenter_lr: float | None = None,
        classifier_lr: float = 1e-5,
        optimizer: OptimizerCallable | None = None,
        weights: str | Path | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__(encoder=encoder, standardize=standardize, optimizer=optimizer)
        check_margin(margin)
        self.automatic_optimization = False
        self.stages = schedule
        self.network = GenDetNet(encoder.width, dim, heads, mlp_ratio, norm_first, activation, dropout)
        self.margin = margin
        self.alpha = alpha
        self.discrepancy_reduction: Reduction = discrepancy_reduction
        self.classifier_fake_features = classifier_fake_features
        self.detector = detector
        augmenter_lr = student_lr if augmenter_lr is None else augmenter_lr
        self.rates = (teacher_lr, student_lr, augmenter_lr, classifier_lr)
        self.register_buffer("stage_steps", torch.zeros(len(STAGES), dtype=torch.int64))
        if weights is not None:
            self.start_from(self.network, weights)
            self.stage_steps.fill_(1)  # whatever trained them

    # Stages

    @property
    def stage(self) -> Stage:
        """The stage of the current epoch."""
        return self.stages.stage(self.current_epoch)

    def training_labels(self, epoch: int) -> tuple[int, ...]:
        """Real epochs read reals, fake and augmenter epochs fakes, the others both."""
        return LABELS[self.stages.stage(epoch)]

    def setup(self, stage: str) -> None:
        """Compare the schedule with the trainer.

        Raises:
            MisconfigurationException: `max_epochs` is not the schedule's total, or the loaders are not
                rebuilt every epoch.
        """
        super().setup(stage)
        if stage != "fit":
            return
        total, limit = self.stages.total, self.trainer.max_epochs
        if limit != total:
            raise MisconfigurationException(
                f"trainer.max_epochs is {limit}, but the schedule has {total} epochs: the stages would not "
                f"all be trained. Set trainer.max_epochs: {total}, or change the schedule."
            )
        if getattr(self.trainer, "reload_dataloaders_every_n_epochs", 1) != 1:
            raise MisconfigurationException(
                "GenDet's stages read different images: set trainer.reload_dataloaders_every_n_epochs: 1."
            )

    def on_train_epoch_start(self) -> None:
        """Refuse a stage whose teacher was never trained."""
        if self.stage != "teacher" and not self.stage_steps[STAGES.index("teacher")]:
            raise MisconfigurationException(
                f"Epoch {self.current_epoch} is of the {self.stage} stage, but the teacher was never "
                "trained: give the schedule teacher_epochs, or start from `weights`."
            )

    def augmented(self, embedded: Tensor) -> Tensor:
        """Embedded fakes (batch, dim) moved by the augmenter G; as they are without one."""
        return self.network.augmenter(embedded) if self.stages.use_augmenter else embedded

    # Training

    def configure_optimizers(self) -> list[Optimizer]:
        """Four optimisers, for {embed, teacher, teacher head}, student, augmenter and classifier; each also
        trains the parameters of its objectives.
        """
        optimizers = []
        for optimizer_name, rate in zip(self.optimizer_names, self.rates, strict=True):
            names = ("embed", "teacher", "teacher_head") if optimizer_name == "teacher" else (optimizer_name,)
            parts = {f"network.{name}": self.network.get_submodule(name) for name in names}
            parts |= {f"objectives.{key}": part for key, part in self.objectives_for(optimizer_name).items()}
            named = [
                (f"{path}.{key}", parameter)
                for path, part in parts.items()
                for key, parameter in part.named_parameters()
            ]
            optimizer = self.build_optimizer(self.optimizer, named)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizers.append(optimizer)
        return optimizers

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step of the stage's optimiser; gradients may flow through other parts, not into them."""
        stage = self.stage
        optimizers: Any = self.optimizers()
        optimizer = optimizers[OPTIMIZERS[stage]]
        self.toggle_optimizer(optimizer)
        loss = self.total_loss(self.compute(batch), batch, batch_idx, self.optimizer_names[OPTIMIZERS[stage]])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        self.stage_steps[STAGES.index(stage)] += 1
        return loss.detach()

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the stage's loss compares: `logits`, or outputs of `teacher` and `student`."""
        network, features, stage = self.network, self.inputs(batch), self.stage
        if stage == "teacher":
            return {"logits": network.teacher_logits(network.embed(features))}
        with torch.no_grad():
            embedded = network.embed(features)
            if stage == "fake" or (stage == "classifier" and self.classifier_fake_features == "augmented"):
                fake = (batch["label"] == 1).unsqueeze(1)
                embedded = torch.where(fake, self.augmented(embedded), embedded)
        if stage == "classifier":
            with torch.no_grad():
                difference = network.discrepancy(embedded)
            return {"logits": network.classifier(difference)}
        if stage == "augment":
            embedded = self.augmented(embedded)
        return {"teacher": network.teacher(embedded), "student": network.student(embedded)}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """One term, named after the stage: the stages' losses are never summed."""
        stage = self.stage
        if stage in ("teacher", "classifier"):
            labels = batch["label"].to(outputs["logits"].dtype)
            return {stage: F.binary_cross_entropy_with_logits(outputs["logits"], labels)}
        pair = outputs["teacher"], outputs["student"]
        if stage == "fake":
            return {stage: disagreement_loss(*pair, self.margin, self.alpha)}
        return {stage: agreement_loss(*pair, self.discrepancy_reduction)}

    # Evaluation

    def on_test_start(self) -> None:
        """Refuse to test what was never trained."""
        needed: dict[str, Stage] = {"classifier": "classifier", "teacher": "teacher", "discrepancy": "real"}
        if not self.stage_steps[STAGES.index(needed[self.detector])]:
            raise MisconfigurationException(
                f"GenDet's {self.detector} was never trained: give --ckpt_path, or `weights`, of a run whose "
                f"schedule has {needed[self.detector]} epochs."
            )

    on_predict_start = on_test_start

    def scorer(self) -> str:
        """What scores now: in `fit` the part that is being trained, otherwise `detector`."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            return self.detector
        return {"teacher": "teacher", "classifier": self.detector}.get(self.stage, "discrepancy")

    def score(self, inputs: Tensor) -> dict[str, Tensor]:
        """`score` in [0, 1], the `teacher`'s logit, and once there is a student the mean `discrepancy`, each
        (batch,).
        """
        embedded = self.network.embed(inputs)
        teacher = self.network.teacher_logits(embedded)
        difference = self.network.discrepancy(embedded)
        mean = difference.mean(dim=-1)
        score = {
            "teacher": lambda: teacher.sigmoid(),
            "discrepancy": lambda: mean / (1 + mean),
            "classifier": lambda: self.network.classifier(difference).sigmoid(),
        }[self.scorer()]()
        trained = bool(self.stage_steps[STAGES.index("real")])
        return {"score": score, "teacher": teacher, **({"discrepancy": mean} if trained else {})}
