"""DFKD-T3-style distillation: a generator that rewrites a general corpus for a student and its teacher."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_modules.base import Terms
from lightning_modules.dfkd_t3.bridge import Relaxation
from lightning_modules.dfkd_t3.generator import TextGenerator
from lightning_modules.dfkd_t3.losses import content_loss, divergence
from lightning_modules.dfkd_t3.objective import GeneratorObjective
from lightning_modules.dfkd_t3.options import GENERATED, Mode, Schedule, TextModel, mode_weights
from lightning_modules.dfkd_t3.replay import ReplayBuffer
from lightning_modules.dfkd_t3.report import CollapseWatch
from lightning_modules.dfkd_t3.sources import RandomTokens
from lightning_modules.dfkd_t3.texts import TextMaker
from lightning_modules.parts.contracts import HasTaskText, datamodule_of, optional
from lightning_modules.parts.frozen import FrozenNetwork
from lightning_modules.parts.text_networks import TextTask


class DataFreeDistillation(TextMaker):
    """Distils a teacher of text into a student without the task's text (after arXiv 2311.01689).

    The paper's equations could not be read: this is the complete method that its abstract describes, with
    losses and defaults of a reconstruction. In every step the generator rewrites sentences of a general
    corpus and is trained through teacher and student, by straight-through Gumbel tokens, for texts of which
    the teacher is sure, that are diverse, and that the student does not know; then the student learns from
    the teacher on texts that are written anew. The teacher comes with a `DataFreeTeacher`.

    Batches of training are dictionaries as `CorpusToTask` makes them: `input_ids` int64 (B, L) and `mask`
    bool (B, L) of sentences without prompt. Those of validation and test are the task's. All modes do
    the same number of student steps.

    Args:
        student: classifier that is trained.
        generator: that rewrites, an encoder and decoder or a masked language model of the student's
            vocabulary; None in the modes without.
        tokenizer: of all three; folder or hub name, None is the student's own.
        num_classes: C.
        task: whether texts or tokens get a class.
        mode: where the student's text comes from, see `Mode`.
        relaxation: how text is drawn, and what carries the gradient.
        objective: the generator's loss.
        schedule: how long, and in which proportions.
        length: L_g, most tokens that are written.
        generator_lr: learning rate of the generator.
        student_lr: learning rate of the student.
        clip: largest norm of each one's gradient; None: as it is.
        hard_weight: alpha, weight of the cross-entropy with the teacher's class.
        random_tokens: of `random_text`: uniform, or drawn as often as the corpus has them.
        freeze_encoder: leave the generator's encoder as it is.
        optimizer: class of both optimisers, AdamW if None; the rates above replace its own.

    Raises:
        OptionError: an option is out of its range.
        MisconfigurationException: vocabularies, label words or modes do not fit.
    """

    def __init__(
        self,
        student: TextModel,
        generator: TextModel | None = None,
        tokenizer: str | None = None,
        num_classes: int = 2,
        task: TextTask = "sequence",
        mode: Mode = "t3",
        relaxation: Relaxation = Relaxation(),
        objective: GeneratorObjective = GeneratorObjective(),
        schedule: Schedule = Schedule(),
        length: int = 64,
        generator_lr: float = 5e-5,
        student_lr: float = 1e-4,
        clip: float | None = 1.0,
        hard_weight: float = 0.0,
        random_tokens: RandomTokens = "uniform",
        freeze_encoder: bool = False,
        optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__(student, generator, tokenizer, num_classes, task, mode, freeze_encoder, optimizer)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}.")
        if task == "tokens" and objective.spec == "label":
            raise MisconfigurationException("objective.spec: label asks for a text's class, not for tokens'.")
        self.automatic_optimization = False
        self.relaxation, self.objective, self.schedule_options = relaxation, objective, schedule
        self.weights = mode_weights(mode, objective.weights)
        self.length = length
        self.rates = {"generator": generator_lr, "student": student_lr}
        self.clip, self.hard_weight = clip, hard_weight
        self.random_tokens: RandomTokens = random_tokens
        self.steps_done = 0
        self._phase = "student"
        self._anchor: FrozenNetwork | None = None
        self._collapse = CollapseWatch()

    # The run

    def setup(self, stage: str) -> None:
        """Build readers and writer; compare mode and data.

        Raises:
            MisconfigurationException: the data reads the task's text in a mode without it or the other way
                round, or there is no teacher.
        """
        super().setup(stage)
        self.reader = self.reads(self.student, self.student_model.prompt)
        self.replay = ReplayBuffer(self.schedule_options.replay, self.special.pad)
        if self.mode in GENERATED:
            prompt = self.prompt_ids(self.generator_prompt)
            self.writer = TextGenerator(self.generator, self.special, prompt, self.relaxation, self.length)
            self.class_prompts = [
                self.prompt_ids(f"{name}: {self.generator_prompt or ''}") for name in self.label_names
            ]
        if stage != "fit":
            return
        data = optional(datamodule_of(self.trainer), HasTaskText)
        if data is not None and data.reads_task != (self.mode == "original_data"):
            wanted, given = ("task", "corpus") if self.mode == "original_data" else ("corpus", "task")
            raise MisconfigurationException(
                f"mode: {self.mode} trains on the {wanted}'s text, and data.train_on is {given}."
            )
        if self.teacher is None:
            raise MisconfigurationException("DataFreeDistillation has no teacher: add a DataFreeTeacher.")
        if self.mode in GENERATED and self.relaxation.decoding == "autoregressive" and self.weights.content:
            self._anchor = FrozenNetwork(copy.deepcopy(self.generator))

    def on_fit_start(self) -> None:
        """Bring the first generator, which anchors the content, to the device."""
        super().on_fit_start()
        if self._anchor is not None:
            self._anchor.to(self.device)

    def on_train_start(self) -> None:
        """Refuse a DDP that would wait for the gradients of what a phase leaves out.

        Raises:
            MisconfigurationException: it does not look for unused parameters.
        """
        wrapped = self.trainer.strategy.model
        if self.mode in GENERATED and getattr(wrapped, "find_unused_parameters", True) is False:
            raise MisconfigurationException(
                "DataFreeDistillation trains generator and student in turn, so in each backward pass half of "
                "the parameters have no gradient: set trainer.strategy: ddp_find_unused_parameters_true."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:  # type: ignore[override]
        """Seed the step; end a run that is complete."""
        super().on_train_batch_start(batch, batch_idx)
        return -1 if self.steps_done >= self.schedule_options.steps else None

    def configure_optimizers(self) -> Any:
        """One optimiser for each of generator and student, with the parameters of its objectives, and the
        schedules of their rates.
        """
        optimizers, schedules = [], []
        for name in self.optimizer_names:
            optimizer = self.build_optimizer(self.optimizer, self.trained_by(name))
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name]
            optimizers.append(optimizer)
            options = self.schedule_options
            generator: Callable[[int], float] = partial(options.generator_rate, self.rates[name])
            factor = options.rate if name == "student" else generator
            schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizer, factor))
        return optimizers, schedules

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        """The generator's steps, then the student's; at the beginning a random generator learns to copy."""
        options = self.schedule_options
        warm = self.mode in GENERATED and self.steps_done < options.warm_start
        counts = {"generator": options.generator_steps, "student": options.student_steps}
        if warm:
            counts = {"generator": 1}
        schedules: Any = self.lr_schedulers()
        schedules = schedules if isinstance(schedules, list) else [schedules]
        for name, schedule in zip(self.optimizer_names, schedules, strict=True):
            for _ in range(counts.get(name, 0)):
                self._optimise("warm_start" if warm else name, name, batch, batch_idx)
            if counts.get(name):
                schedule.step()
        self.steps_done += 1
        if warm and self.steps_done == options.warm_start and self._anchor is not None:
            self._anchor.network.load_state_dict(self.generator.state_dict())
        if self.steps_done >= options.steps:
            self.trainer.should_stop = True

    def _optimise(self, phase: str, name: str, batch: dict[str, Any], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        optimizer = optimizers[self.optimizer_names.index(name)]
        self.toggle_optimizer(optimizer)
        self._phase = phase
        loss = self.total_loss(self.compute(batch), batch, batch_idx, name)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.clip is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    # Losses

    def losses(self, outputs: dict[str, Any], batch: dict[str, Any]) -> Terms:
        """The generator's terms, or the student's `kd` and `hard`."""
        if self._phase == "warm_start":
            source = outputs["source"]
            return {"generator/content": content_loss(outputs["copy"], source.ids, source.mask)}
        pair = outputs["teacher"], outputs["student"]
        if self._phase == "generator":
            text, source = outputs["text"], outputs["source"]
            terms = self.objective.terms(
                self.weights, *pair, text, source, outputs["reference"], self.entity_types()
            )
            return {f"generator/{name}": value for name, value in terms.items()}
        terms = {"student/kd": divergence(*pair, "kl", self.objective.temperature)}
        if self.hard_weight:
            hard = nn.functional.cross_entropy(pair[1].float(), pair[0].argmax(dim=-1))
            terms["student/hard"] = self.hard_weight * hard
        return terms

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run goes on with: the step, the replay buffer, the generator that anchors."""
        super().on_save_checkpoint(checkpoint)
        state: dict[str, Any] = {"steps": self.steps_done}
        if self.trainer.state.fn == "fit":
            state["replay"] = self.replay.state_dict()
            if self._anchor is not None and self.schedule_options.warm_start:
                state["anchor"] = self._anchor.network.state_dict()
        checkpoint["distillation"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("distillation", {})
        self.steps_done = state.get("steps", 0)
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        self.replay.load_state_dict(state.get("replay", {"ids": [], "lengths": []}))
        if self._anchor is not None and "anchor" in state:
            self._anchor.network.load_state_dict(state["anchor"])
