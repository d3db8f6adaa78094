"""The options of a data-free distillation that belong together."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning_modules.dfkd_t3.objective import Weights
from lightning_modules.parts.options import check, check_choice, check_range

Mode = Literal["t3", "original_data", "general_corpus", "random_text", "zskt", "dafl_text", "as_dfd"]
"""Where the student's text comes from: a generator trained by all terms, the task's own text, the corpus as
it is, random tokens, a generator trained by the adversarial term alone (ZSKT), by specificity and balance
alone (DAFL), or free embeddings without a generator (AS-DFD).
"""

GENERATED = ("t3", "zskt", "dafl_text")
"""Modes with a generator."""


def mode_weights(mode: Mode, weights: Weights) -> Weights:
    """The weights of a mode's generator: those of the user in `t3`, fixed ones in the baselines.

    Raises:
        OptionError: all of them are 0 in `t3`.
    """
    if mode == "zskt":
        return Weights(specificity=0, balance=0, adversarial=1, token=0, content=0.1)
    if mode == "dafl_text":
        return Weights(specificity=1, balance=1, adversarial=0, token=0, content=0.1)
    check(mode != "t3" or weights.any, "objective.weights", "all 0", "above 0 somewhere, in mode t3")
    return weights


@dataclass(frozen=True)
class TextModel:
    """A network of transformers with what it wants in front of a sentence.

    Args:
        model: folder or hub name; with `model_args` a model type, which starts from random weights.
        model_args: of the model type's configuration.
        prompt: text in front of a sentence; None is the student's.
        label_words: that a seq2seq classifier answers with; None: a head.
        weights: a checkpoint file of ours to load.
    """

    model: str
    model_args: dict[str, Any] | None = None
    prompt: str | None = None
    label_words: list[str] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Schedule:
    """How long, and in which proportions, generator and student learn (sections 2.4 and 2.5).

    Args:
        steps: N, batches of the whole run; training stops behind the last.
        generator_steps: k_G, of each batch.
        student_steps: k_S, of each batch.
        rho: share of raw corpus text in a student's batch.
        replay: R, generated batches that are kept.
        replay_share: of a student's batch that comes from them.
        warm_start: batches at the beginning in which a random generator learns to copy, and nothing else
            happens; they count for `steps`.
        warm_start_lr: rate meanwhile; None: `generator_lr`.
        warmup: steps in which the rates rise.
        decay: of the rates afterwards, to 0 at the end or not at all.
        sampling_temperature: of the text that the student learns from; 0 is the arg max.

    Raises:
        OptionError: a value is out of its range.
    """

    steps: int = 20_000
    generator_steps: int = 1
    student_steps: int = 1
    rho: float = 0.2
    replay: int = 32
    replay_share: float = 0.2
    warm_start: int = 0
    warm_start_lr: float | None = None
    warmup: int = 0
    decay: Literal["constant", "linear"] = "constant"
    sampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "student_steps", "replay"):
            check_range(f"schedule.{name}", getattr(self, name), "[1, inf)")
        for name in ("generator_steps", "warm_start", "warmup", "sampling_temperature"):
            check_range(f"schedule.{name}", getattr(self, name), "[0, inf)")
        check_range("schedule.rho", self.rho, "[0, 1)")
        check_range("schedule.replay_share", self.replay_share, "[0, 1)")
        check_range("schedule.rho + replay_share", self.rho + self.replay_share, "[0, 1)")
        check_choice("schedule.decay", self.decay, Literal["constant", "linear"])
        check(self.warm_start < self.steps, "schedule.warm_start", self.warm_start, "below schedule.steps")

    def rate(self, step: int) -> float:
        """Factor of the rates at a step that counts from 0, without the warm start."""
        total = self.steps - self.warm_start
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.decay == "constant":
            return rising
        return (
            rising * max(0.0, (total - step) / max(1, total - self.warmup)) if step >= self.warmup else rising
        )

    def generator_rate(self, generator_lr: float, step: int) -> float:
        """Factor of the generator's rate at a step that counts from the warm start's first.

        Args:
            generator_lr: what it is a factor of.
            step: from 0.
        """
        if step >= self.warm_start:
            return self.rate(step - self.warm_start)
        return 1.0 if self.warm_start_lr is None else self.warm_start_lr / generator_lr
