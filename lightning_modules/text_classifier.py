"""TextClassifier: any encoder or seq2seq model of transformers that judges texts, or their tokens."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import Method, Terms
from lightning_modules.language_model import load_tokenizer
from lightning_modules.parts.contracts import (
    HasClassNames,
    HasMetrics,
    HasNumClasses,
    HasParts,
    datamodule_of,
    optional,
)
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.text_metrics import build_metric
from lightning_modules.parts.text_networks import TextTask, build_text_network, text_logits

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def text_inference(words: bool) -> InferenceSpec:
    """How a classifier of texts is called: ids and masks of any length, one output.

    Args:
        words: whether it answers with label words, see `LabelWords`.
    """
    lengths = {name: {1: "length"} for name in INPUTS}
    return InferenceSpec(("logits",), "texts", (0,), lengths, {} if words else {"return_dict": False})


class TextEvaluation(Method):
    """What methods on text tasks share: the metrics of the data's task, over every part of it.

    A child says what the logits of a batch are. Logged are `val/<metric>` and `test/<metric>`; of a task with
    several parts `val/<part>/<metric>`.

    Args:
        num_classes: C; 1 where a number is predicted.
        kwargs: optimiser, schedule and parameter groups, see `Method`.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.task_metrics = nn.ModuleDict()

    def task_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, C), or (B, L, C) of tokens."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Build the metrics that the data names.

        Raises:
            MisconfigurationException: data and model have other numbers of classes.
        """
        data = datamodule_of(self.trainer)
        counted = optional(data, HasNumClasses)
        if counted is not None and counted.num_classes != self.num_classes:
            raise MisconfigurationException(
                f"The data has {counted.num_classes} classes, but model.num_classes is {self.num_classes}."
            )
        metrics, divided, named = (
            optional(data, HasMetrics),
            optional(data, HasParts),
            optional(data, HasClassNames),
        )
        names = (
            metrics.metrics
            if metrics is not None
            else (("accuracy",) if self.num_classes > 1 else ("pearson",))
        )
        tags = None if named is None else named.class_names
        for split in ("val", "test"):
            parts = (split,) if divided is None else divided.parts(split)
            self.task_metrics[split] = nn.ModuleDict(
                {
                    part: nn.ModuleDict({n: build_metric(n, self.num_classes, tags) for n in names})  # type: ignore[arg-type]
                    for part in parts
                }
            )

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Terms:
        """The task's metrics."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Terms:
        """The task's metrics."""
        return self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, split: str, batch: dict[str, Any], part_number: int) -> Terms:
        logits = self.task_logits(batch).float()
        labels = batch["label"]
        predictions = logits.squeeze(-1) if self.num_classes == 1 else logits.argmax(dim=-1)
        parts: Any = self.task_metrics[split]
        name, metrics = list(parts.items())[part_number]
        prefix = split if len(parts) == 1 else f"{split}/{name}"
        for key, metric in metrics.items():
            if labels.ndim > 1 and key != "entity_f1":
                metric.update(predictions[labels != -100], labels[labels != -100])
            else:
                metric.update(predictions, labels)
            self.log(
                f"{prefix}/{key}",
                metric,
                on_step=False,
                on_epoch=True,
                prog_bar=True,
                add_dataloader_idx=False,
            )
        return {"logits": logits}


class TextClassifier(TextEvaluation):
    """Trains, measures and runs a classifier of texts, of their tokens, or a regression on texts.

    Batches are dictionaries as `GlueDataModule` and `EntityDataModule` make them: `input_ids` and
    `attention_mask` int64 (B, L), `token_type_ids` where the tokenizer makes them, `label` int64 (B,) or
    (B, L) with -100 where there is no word, or float32 (B,) of scores, `index` int64 (B,).
    `probabilities` (B, C), as of generated texts, are learned in the label's place.

    Args:
        model: a folder or a hub name; with `model_args` a model type of transformers, such as `bert`, that
            starts from random weights.
        num_classes: C; 1 predicts a score.
        model_args: of the model type's configuration: `hidden_size`, `num_hidden_layers`, ...
        tokenizer: folder or hub name; None is the model's own. `bytes` is one token a byte.
        task: whether texts or tokens get a class.
        label_words: C words that a seq2seq model answers with, such as `[negative, positive]`; None: a head.
        prompt: in front of a sentence, or a template with `{0}` and `{1}` for a task's sentences.
        weights: a checkpoint of this class, or of a distillation whose student it was, to start from.
        loss_weight: of the model's own loss, beside those of callbacks.
        label_smoothing: of the cross-entropy.
        kwargs: optimiser, schedule and parameter groups, see `Method`.

    Raises:
        MisconfigurationException: model or tokenizer cannot be loaded, or label words do not fit.
    """

    network: nn.Module
    metrics = ("accuracy", "f1", "matthews", "pearson", "spearman", "entity_f1")

    def __init__(
        self,
        model: str,
        num_classes: int = 2,
        model_args: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        task: TextTask = "sequence",
        label_words: list[str] | None = None,
        prompt: str | None = None,
        weights: str | Path | None = None,
        loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if tokenizer is None and model_args is not None:
            raise MisconfigurationException(
                "A model from model_args has no tokenizer of its own: set `tokenizer`."
            )
        self.model = model
        self.model_args = model_args
        self.tokenizer_name = tokenizer or model
        self.task: TextTask = task
        self.label_words = label_words
        self.prompt = prompt
        self.weights = weights
        self.loss_weight = loss_weight
        self.label_smoothing = label_smoothing
        self._tokenizer: Any = None
        there = tokenizer == "bytes" or Path(self.tokenizer_name).exists()
        if there and (model_args is not None or Path(model).exists()):
            self.load()

    def load(self) -> None:
        """Load the network, unless it is there; what comes from the hub, or a sample, when a run starts.

        Raises:
            MisconfigurationException: it cannot be loaded.
        """
        if "network" in self._modules:
            return
        self.network = build_text_network(
            self.model,
            self.model_args,
            self.tokenizer,
            self.num_classes,
            self.task,
            self.label_words,
            self.weights,
        )
        if self.weights is not None:
            self.weights_origin = f"file: {self.weights}"
        elif self.model_args is None:
            head = "random head on " * (self.label_words is None)
            self.weights_origin = f"{head}pretrained: {self.model}"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def inference(self) -> InferenceSpec:
        """Logits of ids and masks, of any length."""
        return text_inference(self.label_words is not None)

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Ids, mask, and token types where there are."""
        return {name: batch[name] for name in INPUTS if name in batch}

    def configure_model(self) -> None:
        """Load what is not loaded yet."""
        self.load()

    def setup(self, stage: str) -> None:
        """Load, and build the metrics."""
        self.load()
        super().setup(stage)

    def task_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, C), or (B, L, C) of tokens."""
        return text_logits(self.network, batch)

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logits` (B, C), or (B, L, C) of tokens."""
        return {"logits": self.task_logits(batch)}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """Cross-entropy as `ce`, or the mean squared error of scores as `mse`."""
        if self.loss_weight == 0:
            return {}
        logits, labels = outputs["logits"].float(), batch["label"]
        if self.num_classes == 1:
            return {"mse": self.loss_weight * F.mse_loss(logits.squeeze(-1), labels)}
        wanted = batch.get("probabilities", labels)
        if logits.ndim == 3:
            logits = logits.transpose(1, 2)
        ce = F.cross_entropy(logits, wanted, label_smoothing=self.label_smoothing)
        return {"ce": self.loss_weight * ce}

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """`probabilities` (B, C) or (B, L, C), or `score` (B,), beside `index`, and `label` where known."""
        logits = self.task_logits(batch).float()
        names = ("index", "label", "input_ids")
        known: dict[str, Any] = {name: batch[name] for name in names if name in batch}
        if self.num_classes == 1:
            return {"score": logits.squeeze(-1), **known}
        return {"probabilities": logits.softmax(dim=-1), **known}
