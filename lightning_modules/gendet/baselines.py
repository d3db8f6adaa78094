"""The detectors that GenDet is measured against, with the same data, evaluation and table."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_modules.base import Terms
from lightning_modules.gendet.detector import FakeDetector
from lightning_modules.parts.distributed import rows_of_all_ranks
from lightning_modules.parts.encoder import ImageEncoder
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.normalize import normalized, register_normalization, trained_statistics
from lightning_modules.parts.weights import build_network, load_weights


class LogitDetector(FakeDetector):
    """A network that gives one logit, trained by binary cross-entropy.

    A subclass sets `network`, which maps `inputs(batch)` to (batch, 1).
    """

    network: nn.Module

    def score(self, inputs: Tensor) -> dict[str, Tensor]:
        """The probability as `score`, (batch,)."""
        return {"score": self.network(inputs).squeeze(-1).float().sigmoid()}

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logits` (batch,)."""
        return {"logits": self.network(self.inputs(batch)).squeeze(-1)}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """Binary cross-entropy."""
        labels = batch["label"].to(outputs["logits"].dtype)
        return {"bce": F.binary_cross_entropy_with_logits(outputs["logits"], labels)}


class LinearProbe(LogitDetector):
    """UniversalFakeDetect's linear classifier on frozen features (Ojha et al., CVPR 2023).

    Args:
        encoder: frozen, images to features.
        weights: their released `fc_weights.pth` ({weight (1, width), bias (1,)}), or a checkpoint of ours.
        kwargs: of `FakeDetector`.
    """

    def __init__(self, encoder: ImageEncoder, weights: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(encoder=encoder, **kwargs)
        self.network = nn.Linear(encoder.width, 1)
        nn.init.normal_(self.network.weight, std=0.02)
        nn.init.zeros_(self.network.bias)
        if weights is not None:
            self.start_from(self.network, weights)


class CNNDetector(LogitDetector):
    """CNNDetection: a network trained end to end on images (Wang et al., CVPR 2020).

    Args:
        model: timm model name.
        weights: `pretrained` (timm's ImageNet weights), None, or a checkpoint with one logit, such as the
            released `blur_jpg_prob0.1.pth`.
        model_args: further arguments of timm's model.
        optimizer: see `Method`.
        lr_scheduler: see `Method`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "resnet50.tv_in1k",
        weights: str | Path | None = "pretrained",
        model_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, lr_scheduler=lr_scheduler)
        pretrained = "pretrained" if weights == "pretrained" else None
        network: Any = build_network(model, pretrained, 1, **(model_args or {}))
        nn.init.normal_(network.get_classifier().weight, std=0.02)
        if pretrained is not None:
            self.weights_origin = f"random head on pretrained: {model}"
        elif weights is not None:
            load_weights(network, weights)
            self.weights_origin = f"file: {weights}"
        self.network = network
        register_normalization(self, *trained_statistics(network))

    def inputs(self, batch: dict[str, Any]) -> Tensor:
        """Normalised images."""
        return self.normalize(batch["image"])

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to what the network was made for; same shape."""
        return normalized(images, self.mean, self.std)

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Images in [0, 1]: the inference path normalises them."""
        return {"image": batch["image"]}


class NearestNeighbors(FakeDetector):
    """UniversalFakeDetect's other classifier: the nearer of two banks of training features, by cosine.

    One epoch fills the bank. The score is 0.5 where the nearest real and the nearest fake are equally near,
    and grows with the difference of the two similarities; for k > 1 their means over the k nearest of each
    class are compared, where the paper lets the k nearest vote: that keeps an order for AP.

    Args:
        encoder: frozen, images to features.
        k: neighbours of each class; the paper tries 1, 3, 5 and 9.
        standardize: see `FakeDetector`.
    """

    bank: Tensor
    bank_labels: Tensor
    inference = InferenceSpec(outputs=("scores",), unit="images")

    def __init__(self, encoder: ImageEncoder, k: int = 1, standardize: bool = False) -> None:
        if k < 1:
            raise ValueError(f"k: {k} is no number of neighbours.")
        super().__init__(encoder=encoder, standardize=standardize)
        self.automatic_optimization = False
        self.k = k
        self.steps = nn.Parameter(torch.zeros(()))  # takes part in no score: checkpoints go by steps
        self.register_buffer("bank", torch.empty(0, encoder.width))
        self.register_buffer("bank_labels", torch.empty(0, dtype=torch.int64))
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Features as they come: the module itself standardises them."""
        return {"features": self.features(batch)}

    def configure_optimizers(self) -> Optimizer:
        """An optimiser that changes nothing and counts the steps."""
        return SGD([self.steps], lr=0.0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Remember the batch; there is no loss."""
        optimizer: Any = self.optimizers()
        self._found.append((batch["index"], self.inputs(batch), batch["label"]))
        optimizer.step()
        return self.steps.detach()

    def on_train_epoch_end(self) -> None:
        """Nothing is left to do: `on_validation_start` or `on_train_end` close the bank."""
        self._close_bank()

    def on_validation_start(self) -> None:
        """Validation inside an epoch comes before its end."""
        self._close_bank()

    def _close_bank(self) -> None:
        if self._found:
            _, self.bank, self.bank_labels = self._gathered()
            self._found = []

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index, features and labels of what all ranks have found, each image once, in order."""
        index, features, labels = rows_of_all_ranks(
            *(torch.cat(parts) for parts in zip(*self._found, strict=True))
        )
        return index, features, labels

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In the middle of the epoch: keep what was found."""
        super().on_save_checkpoint(checkpoint)
        if self._found:
            checkpoint["neighbors_found"] = list(self._gathered())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what was found; every rank takes all of it, as each image counts once."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("neighbors_found")
        self._found = [] if found is None else [tuple(part.to(self.device) for part in found)]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("bank", "bank_labels"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def score(self, inputs: Tensor) -> dict[str, Tensor]:
        """`score` (batch,) for features (batch, width).

        Raises:
            MisconfigurationException: a class has fewer than `k` images in the bank.
        """
        similarity = F.normalize(inputs, dim=1) @ F.normalize(self.bank, dim=1).T  # (batch, bank)
        means = []
        for label in (0, 1):
            known = similarity[:, self.bank_labels == label]
            if known.shape[1] < self.k:
                raise MisconfigurationException(
                    f"NearestNeighbors has {known.shape[1]} {('real', 'fake')[label]} images in its bank, "
                    f"and k is {self.k}: train it for one epoch, or give --ckpt_path."
                )
            means.append(known.topk(self.k, dim=1).values.mean(dim=1))
        return {"score": (means[1] - means[0]).sigmoid()}
