"""Teachers of text: one that answers on the task's own data, and one that is handed to a data-free run."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.distillation.base import FrozenTeacher, Teacher
from callbacks.distillation.functional import kd_loss
from lightning_modules.base import Method
from lightning_modules.dfkd_t3.networks import DistilledText
from lightning_modules.language_model import load_tokenizer
from lightning_modules.parts.options import check_range
from lightning_modules.parts.text_networks import TextLogits, TextTask, build_text_network
from lightning_modules.parts.weights import read_checkpoint
from lightning_modules.text_classifier import TextClassifier


class TextTeacher(Teacher):
    """Distils a frozen classifier of texts into a `TextClassifier` on the task's own data: T^2 KL.

    Student and teacher read the same ids, so they share a tokenizer. The term is logged as
    `train/<name>/kd`, and joins the student's own loss (whose share is `model.init_args.loss_weight`).

    Args:
        model: folder or hub name of the teacher; None where `weights` is a checkpoint of a `TextClassifier`,
            which knows its model.
        weights: a checkpoint file; None keeps what `model` brings.
        tokenizer: of the teacher; None: as its model, or as the checkpoint says.
        label_words: that a seq2seq teacher answers with; None: as the checkpoint says, else a head.
        prompt: that the teacher wants; None: as the checkpoint says.
        weight: of the term.
        temperature: T.
        name: of the objective.

    Raises:
        OptionError: the temperature is not positive.
        MisconfigurationException: there is nothing to build the teacher from.
    """

    def __init__(
        self,
        model: str | None = None,
        weights: str | Path | None = None,
        tokenizer: str | None = None,
        label_words: list[str] | None = None,
        prompt: str | None = None,
        weight: float = 1.0,
        temperature: float = 1.0,
        name: str = "text_teacher",
    ) -> None:
        super().__init__(name)
        check_range("temperature", temperature, "(0, inf)")
        if model is None and weights is None:
            raise MisconfigurationException(
                f"{type(self).__name__}: give `model`, or as `weights` a checkpoint of a TextClassifier."
            )
        self.model = model
        self.weights = weights
        self.tokenizer = tokenizer
        self.label_words = label_words
        self.prompt = prompt
        self.weight = weight
        self.temperature = temperature

    def student(self, module: LightningModule) -> nn.Module:
        """The module's network."""
        if not isinstance(module, TextClassifier):
            raise MisconfigurationException(
                f"TextTeacher distils into a TextClassifier; {type(module).__name__} is none."
            )
        module.load()
        return module.network

    def build_teacher(self, module: LightningModule) -> FrozenTeacher:
        """The teacher of a folder, the hub, or a checkpoint of ours.

        Raises:
            MisconfigurationException: it cannot be loaded, or its classes are not the student's.
        """
        network, tokenizer, _ = self.built(_task(module), int(module.num_classes))  # type: ignore[arg-type]
        self._refuse_other_ids(tokenizer, module)
        return FrozenTeacher(TextLogits(network), self.model or str(self.weights))

    def built(self, task: TextTask, num_classes: int) -> tuple[nn.Module, Any, str | None]:
        """Network, tokenizer and prompt.

        Args:
            task: whether texts or tokens get a class.
            num_classes: of the student.
        """
        known: dict[str, Any] = {}
        if self.model is None:
            assert self.weights is not None
            known = read_checkpoint(self.weights).get("hyper_parameters") or {}
            if "model" not in known or "num_classes" not in known:
                raise MisconfigurationException(
                    f"{type(self).__name__}: '{self.weights}' is no checkpoint of a TextClassifier: "
                    "name the `model` too."
                )
            if known["num_classes"] != num_classes:
                raise MisconfigurationException(
                    f"The teacher '{self.weights}' has {known['num_classes']} classes, the student "
                    f"{num_classes}."
                )
        model = self.model or known["model"]
        tokenizer = load_tokenizer(self.tokenizer or known.get("tokenizer") or model)
        words = self.label_words or known.get("label_words")
        network = build_text_network(
            model, known.get("model_args"), tokenizer, num_classes, task, words, self.weights
        )
        return network, tokenizer, self.prompt if self.prompt is not None else known.get("prompt")

    def _refuse_other_ids(self, tokenizer: Any, module: LightningModule) -> None:
        ours: Any = module.tokenizer
        if tokenizer.get_vocab() != ours.get_vocab():
            raise MisconfigurationException(
                f"TextTeacher: the teacher's tokenizer ({len(tokenizer)} tokens) is not the student's "
                f"({len(ours)} tokens), and both read the same ids: let the teacher label the texts offline "
                "(GeneratedTextWriter) instead."
            )

    @property
    def source(self) -> tuple[Any, ...]:
        """Model, weights, tokenizer and words."""
        return (self.model, str(self.weights), self.tokenizer, repr(self.label_words))

    def settings(self) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}

    def build_objective(self, trainer: Trainer, module: Method) -> nn.Module:
        """The term."""
        return TextDistillation(self.frozen, self.weight, self.temperature)


class TextDistillation(nn.Module):
    """The objective of `TextTeacher`; has no parameters, and does not own the teacher."""

    def __init__(self, teacher: FrozenTeacher, weight: float, temperature: float) -> None:
        super().__init__()
        self._teacher = teacher
        self.weight = weight
        self.temperature = temperature

    def forward(self, module: Any, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted `kd`; of tokens the mean over those that begin a word."""
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}

        def ask() -> Tensor:
            return self._teacher(**given)

        teacher, student = self._teacher.once(batch["input_ids"], ask), outputs["logits"]
        if student.ndim == 3:
            words = batch["label"] != -100
            teacher, student = teacher[words], student[words]
        return {"kd": self.weight * kd_loss(student, teacher, self.temperature)}


class DataFreeTeacher(TextTeacher):
    """Hands a frozen teacher to a `DataFreeDistillation`, in `fit`, and in `predict` to label the texts.

    Its vocabulary must be the student's. Gradients pass through it to the text, and none reaches it.

    Args:
        model: see `TextTeacher`.
        weights: likewise.
        tokenizer: likewise.
        label_words: likewise.
        prompt: likewise.
        name: of the callback's state.
    """

    def __init__(
        self,
        model: str | None = None,
        weights: str | Path | None = None,
        tokenizer: str | None = None,
        label_words: list[str] | None = None,
        prompt: str | None = None,
        name: str = "teacher",
    ) -> None:
        super().__init__(model, weights, tokenizer, label_words, prompt, name=name)

    def student(self, module: LightningModule) -> nn.Module:
        """The module's student."""
        if not isinstance(module, DistilledText):
            raise MisconfigurationException(
                f"DataFreeTeacher belongs to a DataFreeDistillation; {type(module).__name__} is none."
            )
        module.load()
        return module.student

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the teacher, and hand it over."""
        if stage not in ("fit", "predict"):
            return
        self.student(pl_module)
        assert isinstance(pl_module, DistilledText)
        with torch.random.fork_rng(devices=[]):  # nobody else's draws may depend on the teacher
            network, tokenizer, prompt = self.built(pl_module.task, pl_module.num_classes)
        self._frozen = FrozenTeacher(network, self.model or str(self.weights))
        pl_module.take_teacher(network, tokenizer, prompt)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the teacher to the run's device."""
        self.on_fit_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the teacher away again."""
        if isinstance(pl_module, DistilledText):
            pl_module.teacher = None
        super().teardown(trainer, pl_module, stage)

    def settings(self) -> dict[str, Any]:
        """None: the module has the temperature."""
        return {}


def _task(module: LightningModule) -> TextTask:
    return module.task  # type: ignore[return-value]
