"""ImageClassifier: any timm network as a student, a teacher or something to compress."""

from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.base import Method, Terms
from lightning_modules.parts.contracts import HasNumClasses, datamodule_of, optional
from lightning_modules.parts.inference import CLASSIFIER
from lightning_modules.parts.normalize import normalized, register_normalization, restored, trained_statistics
from lightning_modules.parts.weights import build_network, weights_origin


class ImageClassifier(Method):
    """Trains and tests a timm network on labelled images.

    Batches are dictionaries: `image` float32 (batch, 3, height, width) in [0, 1], `label` int64 (batch,),
    `index` int64 (batch,); for prediction also `path`. Normalisation, random erasing and mixup happen here,
    on the device; `batch["image"]` stays un-normalised, so a teacher may use statistics of its own.

    Args:
        model: timm model name.
        num_classes: width of the classifier; must be the data's. The command fills in null: the checkpoint's,
            else the data's.
        weights: None (random), `pretrained` (timm's own) or a checkpoint file.
        model_args: further arguments of timm's model (`img_size`, `drop_path_rate`, ...).
        mean: per-channel mean for the normalisation; None takes the model's own from timm.
        std: per-channel standard deviation; None takes the model's own.
        label_smoothing: in [0, 1); with mixup it smooths the mixed labels.
        loss: `ce` (soft-target cross-entropy where labels are mixed) or `bce` (binary, one sigmoid a class).
        loss_weight: weight of this loss beside the objectives'; 0 leaves the objectives alone.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off.
        mix_probability: share of batches that are mixed.
        mix_switch_probability: share of cutmix where both are on.
        random_erasing: probability of erasing a rectangle with per-pixel noise (timm's RandomErasing).
        compile: `torch.compile` the network for training.
        kwargs: optimiser, schedule and parameter groups, see `Method`.
    """

    metrics = ("top1", "top5")
    mean: Tensor
    std: Tensor
    inference = CLASSIFIER

    def __init__(
        self,
        model: str,
        num_classes: int | None,
        weights: str | Path | None = None,
        model_args: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        label_smoothing: float = 0.0,
        loss: Literal["ce", "bce"] = "ce",
        loss_weight: float = 1.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        mix_switch_probability: float = 0.5,
        random_erasing: float = 0.0,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes is None:
            raise MisconfigurationException("model.init_args.num_classes: expected the number of classes.")
        if num_classes < 2:
            raise MisconfigurationException(
                f"model.init_args.num_classes: {num_classes}; two classes or more are needed."
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.hparams["num_classes"] = (
            num_classes  # the command may have filled it in since it noted the options
        )
        self.network = build_network(model, weights, num_classes, **(model_args or {}))
        self.weights_origin = weights_origin(self.network, model, weights)
        if compile:
            self.network.compile()
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.loss = loss
        self.loss_weight = loss_weight
        statistics = trained_statistics(self.network)
        register_normalization(self, mean or statistics.mean, std or statistics.std)
        self.mix = None
        if mixup > 0 or cutmix > 0:
            self.mix = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mix_probability,
                switch_prob=mix_switch_probability,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        self.random_erasing = random_erasing
        self._ranks = (1, 5) if num_classes > 5 else (1,)  # of five classes the true one is always among five
        for stage in ("val", "test"):
            for k in self._ranks:
                setattr(self, f"{stage}_top{k}", MulticlassAccuracy(num_classes, top_k=k, average="micro"))

    def setup(self, stage: str) -> None:
        """Compare the class counts of data and model.

        Raises:
            MisconfigurationException: they differ; names both numbers.
        """
        if stage == "predict":
            return  # pictures to predict on have no classes of their own
        data = optional(datamodule_of(self.trainer), HasNumClasses)
        found = None if data is None else data.num_classes
        if found is not None and found != self.num_classes:
            raise MisconfigurationException(
                f"The data has {found} classes, but model.num_classes is {self.num_classes}."
            )

    # Inference

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to what the network was made for; same shape."""
        return normalized(images, self.mean, self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width) in [0, 1]."""
        return self.network(self.normalize(images))

    # Training

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Random erasing and mixup or cutmix; mixed labels become (batch, classes) probabilities."""
        images = batch["image"]
        if self.random_erasing > 0:
            # timm draws unit noise for normalised images: erase there, and come back to [0, 1] images
            eraser = RandomErasing(self.random_erasing, mode="pixel", max_count=1, device=images.device)
            images = restored(eraser(self.normalize(images)), self.mean, self.std)
        if self.mix is None:
            return {**batch, "image": images}
        if len(images) % 2:
            raise MisconfigurationException(
                f"Mixup pairs the images of a batch, and this one has {len(images)}: use an even "
                "data.batch_size and "
                "data.drop_last."
            )
        images, labels = self.mix(images.clone(), batch["label"])
        return {**batch, "image": images, "label": labels}

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logits` (batch, classes)."""
        return {"logits": self(batch["image"])}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """Cross-entropy (or binary cross-entropy) against the labels, under its own name."""
        if self.loss_weight == 0:
            return {}
        smoothing = 0.0 if self.mix is not None else self.label_smoothing
        return {self.loss: self.loss_weight * self._loss(outputs["logits"], batch["label"], smoothing)}

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        logits = logits.float()
        if self.loss == "ce":
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if labels.ndim == 1:
            labels = (
                F.one_hot(labels, self.num_classes).float() * (1 - smoothing) + smoothing / self.num_classes
            )
        return F.binary_cross_entropy_with_logits(logits, labels)

    # Evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Top-1 and, of more than five classes, top-5 accuracy, fractions; `val/loss`, without smoothing."""
        return self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Top-1 and, of more than five classes, top-5 accuracy, fractions."""
        return self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Any]) -> Terms:
        logits = self(batch["image"])
        if stage == "val":
            loss = self._loss(logits, batch["label"])
            self.log("val/loss", loss, on_epoch=True, batch_size=len(logits), sync_dist=True)
        for k in self._ranks:
            metric = getattr(self, f"{stage}_top{k}")
            metric.update(logits, batch["label"])
            self.log(f"{stage}/top{k}", metric, on_step=False, on_epoch=True, prog_bar=k == 1)
        return {"probabilities": logits.float().softmax(dim=-1)}  # NaN also where logits overflow

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`probabilities` (batch, classes) beside the batch's `index`, and its `label` and `path` where
        known.
        """
        known: dict[str, Any] = {key: batch[key] for key in ("index", "label", "path") if key in batch}
        return {"probabilities": self(batch["image"]).float().softmax(dim=-1), **known}
