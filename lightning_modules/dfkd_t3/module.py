"""DFKD-T3-style distillation: a generator that rewrites a general corpus for a student and its teacher."""

import copy
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import Terms
from lightning_modules.dfkd_t3.bridge import Relaxation, WrittenText
from lightning_modules.dfkd_t3.generator import TextGenerator
from lightning_modules.dfkd_t3.losses import content_loss, divergence
from lightning_modules.dfkd_t3.networks import DistilledText
from lightning_modules.dfkd_t3.objective import GeneratorObjective
from lightning_modules.dfkd_t3.options import GENERATED, Mode, Schedule, TextModel, mode_weights
from lightning_modules.dfkd_t3.replay import ReplayBuffer, together
from lightning_modules.dfkd_t3.report import CollapseWatch, describe
from lightning_modules.dfkd_t3.sources import RandomTokens, free_embeddings, random_text
from lightning_modules.parts.contracts import HasTaskText, datamodule_of, optional
from lightning_modules.parts.frozen import FrozenNetwork, evaluating
from lightning_modules.parts.text_networks import TextTask


class DataFreeDistillation(DistilledText):
    """Distils a teacher of text into a student without the task's text (after arXiv 2311.01689).

    The paper's equations could not be read: this is the complete method that its abstract describes, with
    losses and defaults of a reconstruction. In every step the generator rewrites sentences of a general
    corpus and is trained through teacher and student, by straight-through Gumbel tokens, for texts of which
    the teacher is sure, that are diverse, and that the student does not know; then the student learns from
    the teacher on texts that are written anew. The teacher comes with a `DataFreeTeacher`.

    Batches of training are dictionaries as `CorpusToTask` makes them: `input_ids` int64 (B, L) and `mask` bool
    (B, L) of sentences without prompt. Those of validation and test are the task's. All modes do the same
    number of student steps.

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
            parts: dict[str, nn.Module] = {name: self.get_submodule(name)}
            if name == "student" and "student_extra" in self._modules:
                parts["student_extra"] = self.student_extra
            parts |= {f"objectives.{key}": part for key, part in self.objectives_for(name).items()}
            named = [(f"{p}.{n}", value) for p, part in parts.items() for n, value in part.named_parameters()]
            optimizer = self.build_optimizer(self.optimizer, named)
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name]
            optimizers.append(optimizer)
            schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizer, partial(self._rate, name)))
        return optimizers, schedules

    def _rate(self, name: str, step: int) -> float:
        options = self.schedule_options
        if step >= options.warm_start:
            return options.rate(step - options.warm_start)
        faster = options.warm_start_lr if name == "generator" else None
        return 1.0 if faster is None else faster / self.rates[name]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The generator's steps, then the student's; at the beginning a random generator learns to copy."""
        options = self.schedule_options
        warm = self.mode in GENERATED and self.steps_done < options.warm_start
        generator_steps = 1 if warm else options.generator_steps
        for phase, count in (
            ("generator", generator_steps),
            ("student", 0 if warm else options.student_steps),
        ):
            for _ in range(count if phase in self.optimizer_names else 0):
                self._optimise("warm_start" if warm else phase, phase, batch, batch_idx)
        schedules: Any = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
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

    def compute(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the phase's loss compares: logits of `teacher` and `student`, and the `text` they are of."""
        source = WrittenText(batch["input_ids"], batch["mask"])
        if self._phase == "warm_start":
            return {"source": source, "copy": self.writer.copy_logits(source)}
        if self._phase == "generator":
            return self._generator_outputs(source)
        if self.mode == "as_dfd":
            return self._embedding_outputs(source)
        text = self._student_text(source)
        with torch.no_grad():
            teacher = self._valid(self.teacher(text), text)
        return {"text": text, "teacher": teacher, "student": self._valid(self.reader(text), text)}

    def _generator_outputs(self, source: WrittenText) -> dict[str, Any]:
        labels = self._labels(source)
        tau = self.relaxation.tau(self.steps_done / self.schedule_options.steps)
        text = self.writer.write(source, tau, labels, self.class_prompts)
        teacher = self._valid(self.teacher(text), text)
        student = torch.zeros_like(teacher)
        if self.weights.adversarial:
            with evaluating(self.student):
                student = self._valid(self.reader(text), text)
        reference = None
        if self._anchor is not None:
            with torch.no_grad():
                reference = self.writer.reference_logits(
                    self._anchor.network, source, text, labels, self.class_prompts
                )
        self._report(text, source, teacher, student)
        return {
            "text": text,
            "source": source,
            "teacher": teacher,
            "student": student,
            "reference": reference,
        }

    def _embedding_outputs(self, source: WrittenText) -> dict[str, Any]:
        shape = (len(source), source.ids.shape[1], self.teacher.width)
        like = next(self.student.parameters())
        with evaluating(self.student), torch.enable_grad():
            embedded = free_embeddings(
                shape, self.teacher.of_embeddings, self._extended, self.num_classes, self.objective, like
            )
        with torch.no_grad():
            teacher = self.teacher.of_embeddings(embedded)
        return {"teacher": teacher, "student": self._extended(embedded)}

    def _extended(self, embedded: Tensor) -> Tensor:
        if "student_extra" in self._modules:
            embedded = self.student_extra(embedded)
        return self.reader.of_embeddings(embedded)

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

    # Text

    def _student_text(self, source: WrittenText) -> WrittenText:
        if self.mode in ("original_data", "general_corpus"):
            return source
        if self.mode == "random_text":
            return random_text(source, self.special, self.random_tokens)
        options, count = self.schedule_options, len(source)
        raw = int(options.rho * count)
        replayed = int(options.replay_share * count) if len(self.replay) else 0
        new = count - raw - replayed
        written = self.written(rows(source, slice(0, new)))
        parts = [written]
        if raw:
            parts.append(rows(source, slice(new, new + raw)))
        if replayed:
            parts.append(self.replay.draw(replayed, source.ids.device))
        self.replay.add(written)
        return together(parts, self.special.pad)

    def written(self, source: WrittenText) -> WrittenText:
        """What the mode makes of sentences, without a gradient.

        Raises:
            MisconfigurationException: the mode makes no text.
        """
        if self.mode == "random_text":
            return random_text(source, self.special, self.random_tokens)
        if self.mode == "as_dfd":
            raise MisconfigurationException("mode: as_dfd makes embeddings, which are no text to write.")
        if self.mode not in GENERATED:
            return source
        temperature = self.schedule_options.sampling_temperature
        with evaluating(self.generator):
            return self.writer.sample(source, temperature, self._labels(source), self.class_prompts)

    def _labels(self, source: WrittenText) -> Tensor | None:
        if self.objective.spec != "label":
            return None
        return torch.randint(self.num_classes, (len(source),), device=source.ids.device)

    def _valid(self, logits: Tensor, text: WrittenText) -> Tensor:
        """Logits (B, C); of tokens (N, C), those of valid positions."""
        return logits[text.mask] if logits.ndim == 3 else logits

    def _report(self, text: WrittenText, source: WrittenText, teacher: Tensor, student: Tensor) -> None:
        self._collapse.see(text, self.weights.token)
        if self.steps_done % max(1, self.trainer.log_every_n_steps):
            return
        values = describe(text, source, teacher)
        values["divergence"] = divergence(teacher.detach(), student.detach())
        self.log_dict({f"generator/{name}": float(value) for name, value in values.items()}, batch_size=1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """`text` that is written of each sentence and the teacher's `probabilities` (B, C), beside `index`."""
        text = self.written(WrittenText(batch["input_ids"], batch["mask"]))
        if self.teacher is None:
            raise MisconfigurationException("predict labels what it writes: add the DataFreeTeacher.")
        if self.task == "tokens":
            raise MisconfigurationException("predict writes labelled texts, and task: tokens labels tokens.")
        texts = [
            self.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)
            for ids, mask in zip(text.ids, text.mask, strict=True)
        ]
        probabilities = self.teacher(text).float().softmax(dim=-1)
        return {"index": batch["index"], "text": texts, "probabilities": probabilities}

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


def rows(text: WrittenText, chosen: slice) -> WrittenText:
    """Some texts of a batch."""
    return WrittenText(text.ids[chosen], text.mask[chosen])
