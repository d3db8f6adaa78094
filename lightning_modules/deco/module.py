"""DecoDetector: trains and tests DECO and DECO+."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.base import Method, Terms
from lightning_modules.deco.boxes import Detections, detections_of, normalised, resized
from lightning_modules.deco.deploy import deploy
from lightning_modules.deco.evaluation import CocoEvaluation
from lightning_modules.deco.losses import (
    FocalCriterion,
    SetCriterion,
    Targets,
    VarifocalCriterion,
    assignment_errors,
    pad_targets,
)
from lightning_modules.deco.names import compare_class_counts, recall_names
from lightning_modules.deco.network import DetectionNetwork, network_images
from lightning_modules.deco.plus import DecoPlus
from lightning_modules.deco.released import load_backbone, load_detector
from lightning_modules.parts.contracts import datamodule_of
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.normalize import register_normalization


class DecoDetector(Method):
    """Query-based detection with convolutions only: the network decides whether it is DECO or DECO+.

    Batches are dictionaries: `image` float32 (batch, 3, height, width) in [0, 1], `mask` bool (batch,
    height, width), true for padding, and `targets`, one dictionary an image with `boxes` (n, 4) as (x1,
    y1, x2, y2) in pixels, `labels` int64 (n,), `size` and `orig_size` (2,) as height and width in the
    batch and on disk, and `image_id`. Evaluation also reads `annotations`, see `CocoEvaluation.update`;
    prediction `index` and `path`.

    Args:
        network: `Deco` or `DecoPlus`, or another `DetectionNetwork`.
        criterion: matching and losses; None is the published one for the network.
        weights: a detector's checkpoint, the authors' or ours.
        backbone_weights: `pretrained`, or a file with an ImageNet classifier; `weights` make it needless.
        multi_scale: sides of squares; each training batch is resized to one of them (DECO+). None does not.
        multi_scale_mode: `nearest` as published, or `bilinear`, which does not alias.
        detections: kept of each image; None is the number of queries.
        deployed: test and predict with the network's inference form, see `deploy`.
        compile: `torch.compile` the network.
        kwargs: optimiser, schedule and parameter groups, see `Method`.
    """

    metrics = ("AP",)
    mean: Tensor
    std: Tensor
    inference = InferenceSpec(
        outputs=("logits", "boxes"), unit="images", kinds={"logits": "bernoulli", "boxes": "number"}
    )

    def __init__(
        self,
        network: DetectionNetwork,
        criterion: SetCriterion | None = None,
        weights: str | Path | None = None,
        backbone_weights: str | Path | None = None,
        multi_scale: list[int] | None = None,
        multi_scale_mode: Literal["nearest", "bilinear"] = "nearest",
        detections: int | None = None,
        deployed: bool = False,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = network
        if criterion is None:
            criterion = VarifocalCriterion() if isinstance(network, DecoPlus) else FocalCriterion()
        self.criterion = criterion
        if weights is not None:
            load_detector(network, weights)
            self.weights_origin = f"file: {weights}"
        elif backbone_weights is not None:
            load_backbone(network, backbone_weights)
            self.weights_origin = f"random head on backbone: {backbone_weights}"
        if compile:
            network.compile()
        self.num_classes = network.num_classes
        self.multi_scale = multi_scale
        self.multi_scale_mode = multi_scale_mode
        self.detections = detections or network.num_queries
        self.deployed = deployed
        self._trained: tuple[DetectionNetwork, ...] = ()  # no submodule while it waits
        register_normalization(self, network.mean, network.std)
        self._evaluation = CocoEvaluation()

    def setup(self, stage: str) -> None:
        """Compare the class counts of data and model.

        Raises:
            MisconfigurationException: the data has more classes; names both numbers.
        """
        compare_class_counts(datamodule_of(self.trainer), self.num_classes, stage)

    # Inference

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to what the network was made for; same shape."""
        return network_images(images, self.mean, self.std, None)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The network's outputs, see `DetectionNetwork`.

        Args:
            images: (batch, 3, height, width) in [0, 1].
            mask: bool (batch, height, width), true for padding, which the network sees as zeros after the
                normalisation; nothing else comes of it.
        """
        return self.network(network_images(images, self.mean, self.std, mask))

    # Training

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Resize to one of the squares of `multi_scale`, boxes and all."""
        if not self.multi_scale:
            return batch
        side = self.multi_scale[int(torch.randint(len(self.multi_scale), ()))]
        return resized(batch, side, self.multi_scale_mode)

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logits` (batch, queries, classes) and `boxes` (batch, queries, 4), and auxiliary ones."""
        return self(batch["image"], batch.get("mask"))

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """The criterion's terms; the share of wrong classes among the matched queries is logged beside."""
        targets = self._targets(batch)
        assignment = self.criterion.assign(outputs, targets)
        errors = assignment_errors(outputs["logits"], targets, assignment)
        self.log_dict({f"train/{name}": value for name, value in errors.items()}, batch_size=1)
        return self.criterion(outputs, targets, assignment)

    def _targets(self, batch: dict[str, Any]) -> Targets:
        boxes = [normalised(target["boxes"], target["size"]) for target in batch["targets"]]
        return pad_targets([target["labels"] for target in batch["targets"]], boxes, self.num_classes)

    # Evaluation

    def detect(self, batch: dict[str, Any]) -> Detections:
        """The best detections of each image, in pixels of the originals."""
        outputs = self(batch["image"], batch.get("mask"))
        sizes = torch.stack([target["orig_size"] for target in batch["targets"]])
        return detections_of(outputs["logits"], outputs["boxes"], sizes, self.detections)

    def on_validation_epoch_start(self) -> None:
        """Begin with no image."""
        self._evaluation.reset()

    def on_test_epoch_start(self) -> None:
        """Begin with no image."""
        self._evaluation.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Collect detections and ground truth."""
        return self._collect(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Collect detections and ground truth."""
        return self._collect(batch)

    def _collect(self, batch: dict[str, Any]) -> Terms:
        if "annotations" not in batch:
            raise MisconfigurationException(
                "DecoDetector evaluates batches that have `annotations`, as those of CocoDataModule have."
            )
        image_ids = torch.stack([target["image_id"] for target in batch["targets"]])
        detections = self.detect(batch)
        self._evaluation.update(image_ids, detections, batch["annotations"])
        return detections._asdict()

    def on_validation_epoch_end(self) -> None:
        """Log `val/AP` and COCO's eleven other numbers."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/AP` and COCO's eleven other numbers."""
        self._report("test")

    def _report(self, stage: str) -> None:
        for name, value in self._evaluation.compute().items():
            # every rank has the same numbers
            self.log(f"{stage}/{name}", value, prog_bar=name == "AP")
        self._evaluation.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`scores` and `labels` (batch, k), `boxes` (batch, k, 4) in pixels of the originals, and the images'
        `image_id` (batch,), `orig_size` (batch, 2), `index` and `path`.
        """
        targets = batch["targets"]
        known: dict[str, Any] = {key: batch[key] for key in ("index", "path") if key in batch}
        known |= {key: torch.stack([target[key] for target in targets]) for key in ("image_id", "orig_size")}
        return {**self.detect(batch)._asdict(), **known}

    # Checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have the data number its labels by the class names that the weights were trained with."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None:
            recall_names(checkpoint, datamodule_of(self.trainer))

    # Deployment

    def on_test_start(self) -> None:
        """Change to the inference form if wanted."""
        self._deploy()

    def on_predict_start(self) -> None:
        """Change to the inference form if wanted."""
        self._deploy()

    def on_test_end(self) -> None:
        """Change back; by now every callback has reported."""
        self._restore()

    def on_predict_end(self) -> None:
        """Change back."""
        self._restore()

    def _deploy(self) -> None:
        if self.deployed:
            self._trained, self.network = (self.network,), deploy(self.network)

    def _restore(self) -> None:
        if self._trained:
            (self.network,), self._trained = self._trained, ()
