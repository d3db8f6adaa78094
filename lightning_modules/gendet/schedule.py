"""Which stage an epoch belongs to: a pure function of its number, so that any epoch can be resumed."""

from dataclasses import dataclass
from typing import Literal, get_args

Stage = Literal["teacher", "real", "fake", "augment", "classifier"]
STAGES: tuple[Stage, ...] = get_args(Stage)

LABELS: dict[Stage, tuple[int, ...]] = {
    "teacher": (0, 1),
    "real": (0,),
    "fake": (1,),
    "augment": (1,),
    "classifier": (0, 1),
}
"""Labels (0 real, 1 fake) of the images that an epoch of a stage reads."""


@dataclass(frozen=True)
class StageSchedule:
    """Teacher epochs, then rotations of one real, one fake and one augmenter epoch, then classifier epochs.

    Lightning builds an epoch's loader before the hooks of its start, so a stage that a hook sets would be one
    epoch late for the data. Here module and data both ask for the stage of an epoch by its number.

    Args:
        teacher_epochs: that train the teacher; it is frozen afterwards.
        rotations: R of the paper.
        classifier_epochs: that train the last classifier.
        use_fake_stage: false trains the student on real images only (the paper's ablation "AD").
        use_augmenter: false shows the fake features to the student as they are ("AD with fake loss").

    Raises:
        ValueError: a number is negative, or all are zero.
    """

    teacher_epochs: int = 10
    rotations: int = 10
    classifier_epochs: int = 10
    use_fake_stage: bool = True
    use_augmenter: bool = True

    def __post_init__(self) -> None:
        for name in ("teacher_epochs", "rotations", "classifier_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must not be negative, got {getattr(self, name)}.")
        if self.total == 0:
            raise ValueError("schedule: it has no epoch at all.")

    @property
    def rotation(self) -> tuple[Stage, ...]:
        """The stages of one rotation."""
        if not self.use_fake_stage:
            return ("real",)
        return ("real", "fake", "augment") if self.use_augmenter else ("real", "fake")

    @property
    def total(self) -> int:
        """Epochs of the whole run; what `trainer.max_epochs` must be."""
        return self.teacher_epochs + self.rotations * len(self.rotation) + self.classifier_epochs

    def stage(self, epoch: int) -> Stage:
        """The stage of an epoch; past the end it stays at the last one."""
        adversarial = epoch - self.teacher_epochs
        if adversarial < 0:
            return "teacher"
        if adversarial < self.rotations * len(self.rotation):
            return self.rotation[adversarial % len(self.rotation)]
        if self.classifier_epochs:
            return "classifier"
        return self.rotation[-1] if self.rotations else "teacher"

    def rotation_of(self, epoch: int) -> int:
        """Number of the rotation of an epoch, from 1; 0 before the first, R after the last."""
        done = max(0, epoch - self.teacher_epochs)
        started = 0 if epoch < self.teacher_epochs else done // len(self.rotation) + 1
        return min(started, self.rotations)
