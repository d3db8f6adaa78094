"""The texts of a data-free distillation: what is written in each phase and mode, and what is said of it."""

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.dfkd_t3.bridge import WrittenText
from lightning_modules.dfkd_t3.generator import TextGenerator
from lightning_modules.dfkd_t3.losses import divergence
from lightning_modules.dfkd_t3.networks import DistilledText
from lightning_modules.dfkd_t3.objective import GeneratorObjective, Weights
from lightning_modules.dfkd_t3.options import GENERATED, Schedule
from lightning_modules.dfkd_t3.reader import TextReader
from lightning_modules.dfkd_t3.replay import ReplayBuffer, together
from lightning_modules.dfkd_t3.report import CollapseWatch, describe
from lightning_modules.dfkd_t3.sources import RandomTokens, free_embeddings, random_text
from lightning_modules.parts.frozen import FrozenNetwork, evaluating


class TextMaker(DistilledText):
    """Writes texts with and without a gradient, and asks teacher and student about them."""

    objective: GeneratorObjective
    schedule_options: Schedule
    weights: Weights
    writer: TextGenerator
    class_prompts: list[list[int]]
    reader: TextReader
    replay: ReplayBuffer
    random_tokens: RandomTokens
    steps_done: int
    _anchor: FrozenNetwork | None
    _collapse: CollapseWatch
    _phase: str

    # What is compared

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
        relaxation: Any = self.relaxation
        tau = relaxation.tau(self.steps_done / self.schedule_options.steps)
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
        every: int = getattr(self.trainer, "log_every_n_steps", 50)
        if self.steps_done % max(1, every):
            return
        values = describe(text, source, teacher)
        values["divergence"] = divergence(teacher.detach(), student.detach())
        self.log_dict({f"generator/{name}": float(value) for name, value in values.items()}, batch_size=1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """`text` that is written of each sentence, the teacher's `probabilities` (B, C), and `index`."""
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


def rows(text: WrittenText, chosen: slice) -> WrittenText:
    """Some texts of a batch."""
    return WrittenText(text.ids[chosen], text.mask[chosen])
