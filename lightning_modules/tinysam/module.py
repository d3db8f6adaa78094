"""TinySAMModule: trains, tests and runs a promptable segmenter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.base import Method, Terms
from lightning_modules.parts.inference import InferencePart, InferenceSpec
from lightning_modules.parts.normalize import normalized, register_normalization
from lightning_modules.parts.options import check_range
from lightning_modules.parts.reproducibility import derived_seed, run_seed
from lightning_modules.tinysam.calibration import KINDS, CalibrationPass
from lightning_modules.tinysam.deploy import decoder_part
from lightning_modules.tinysam.frame import MEAN, STD, inside
from lightning_modules.tinysam.losses import Reduction, iou_loss, mask_loss, reduced
from lightning_modules.tinysam.network import SAM, load_sam
from lightning_modules.tinysam.prompts import STRIDE, Prompts, decode_prompts, hard_points, noisy_boxes
from lightning_modules.tinysam.protocols import Protocol, make_measure, predicted
from lightning_modules.tinysam.training import freeze_what_is_not_trained, layer_factors, load_decoder


@dataclass(frozen=True)
class HardPrompts:
    """Which prompts a step trains on.

    Args:
        enabled: ask the student where it fails; otherwise points are uniform over the masks.
        rounds: most rounds of asking; each step draws a number from 0 to this, the same on all ranks.
        box_prob: share of prompts that are boxes of the masks, with noise, instead.
    """

    enabled: bool = True
    rounds: int = 9
    box_prob: float = 0.0

    def __post_init__(self) -> None:
        check_range("prompts.rounds", self.rounds, "[0, inf)")
        check_range("prompts.box_prob", self.box_prob, "[0, 1]")


class TinySAMModule(CalibrationPass, Method):
    """A promptable segmenter: image encoder, prompt encoder and mask decoder.

    Trains on the masks of `SA1BDataModule`; with the callback `SAMTeacher` it is TinySAM, without it the
    baseline on ground truth alone. The prompt encoder is frozen, and so is what multi-mask output does not
    use.

    Args:
        network: the student.
        weights: a file of SAM's names (`tinysam.pth`, `mobile_sam.pt`, a SAM) or a checkpoint of ours.
        decoder_weights: a file to take prompt encoder and mask decoder from: the teacher's.
        prompts: which prompts a step trains on.
        mask_weight: of focal and dice loss on the ground truth.
        iou_weight: of the L1 loss of the predicted IoUs.
        mask_reduction: `mean` over the masks or `sum`.
        train_decoder: False trains the image encoder alone.
        bn_mode: `frozen` keeps the running statistics of the encoder's norms; `train` needs batches of some
            images, or `trainer.sync_batchnorm`.
        layer_lr_decay: factor of the learning rate from each block of the encoder to the one before it.
        prompts_per_chunk: decode so many prompts at a time and their activations again in the backward pass;
            null: all at once, at 800 MB a prompt at 1024 pixels.
        protocol: how validation and test prompt, see `protocols`.
        kwargs: optimiser, schedule and parameter groups, see `Method`.
    """

    metrics = ("miou",)
    mean: Tensor
    std: Tensor
    inference = InferenceSpec(outputs=("embedding",), unit="images", kinds=KINDS)

    def __init__(
        self,
        network: SAM,
        weights: str | Path | None = None,
        decoder_weights: str | Path | None = None,
        prompts: HardPrompts = HardPrompts(),
        mask_weight: float = 1.0,
        iou_weight: float = 1.0,
        mask_reduction: Reduction = "mean",
        train_decoder: bool = True,
        bn_mode: Literal["train", "frozen"] = "train",
        layer_lr_decay: float = 1.0,
        prompts_per_chunk: int | None = None,
        protocol: Protocol = Protocol(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(ignore=["network", "optimizer", "lr_scheduler", "prompts", "protocol"])
        self.network = network
        self.prompts = prompts
        self.mask_weight, self.iou_weight = mask_weight, iou_weight
        self.mask_reduction: Reduction = mask_reduction
        self.prompts_per_chunk = prompts_per_chunk
        self.encoder: Any = None
        """A teacher's, whose embeddings the data may cache; `SAMTeacher` puts it there."""
        if decoder_weights is not None:
            load_decoder(network, decoder_weights)
            self.weights_origin = f"random encoder with the decoder of: {decoder_weights}"
        if weights is not None:
            load_sam(network, weights)
            self.weights_origin = f"file: {weights}"
        freeze_what_is_not_trained(network, train_decoder, bn_mode == "frozen")
        self.lr_multipliers = {**layer_factors(network, layer_lr_decay), **self.lr_multipliers}
        register_normalization(self, MEAN, STD)
        self.protocol = protocol
        self._measured = make_measure(protocol)

    # Inference

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] without padding to what the encoder takes; same shape."""
        return normalized(images, self.mean, self.std)

    def forward(self, images: Tensor, size: Tensor | None = None) -> Tensor:
        """Embeddings (batch, 256, side / 16, side / 16).

        Args:
            images: (batch, 3, side, side) in [0, 1].
            size: (batch, 2), height and width of the pictures in them; the rest is padding. None: all of it.
        """
        return self.network(self.normalize(images), size)

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`image` in the frame, and the `size` of the picture in it."""
        return {"image": batch["image"], "size": batch["size"]}

    def inference_parts(self, inputs: Mapping[str, Tensor]) -> dict[str, InferencePart]:
        """The decoder, with SAM's inputs and outputs: see `PromptedDecoder`."""
        return {"decoder": decoder_part(self.network, self(*inputs.values()))}

    # Training

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`embedding` (B, 256, h, w) of the images; of each of N prompts `masks` (N, 3, 4h, 4w), `iou` (N, 3)
        and `tokens` (N, 5, 256), its image `owner` (N,), the prompt itself, its `target` and `valid` pixels.
        """
        embedding = self(batch["image"], batch["size"])
        target, owner = batch["masks"], batch["owner"]
        prompts = self.draw_prompts(embedding.detach(), target, owner)
        valid = inside(batch["size"], target.shape[-1], STRIDE)[owner]
        outputs = {"embedding": embedding, "owner": owner, "target": target, "valid": valid}
        return {**outputs, **prompts._asdict(), **self._decode(embedding, owner, prompts)}

    def draw_prompts(self, embedding: Tensor, target: Tensor, owner: Tensor) -> Prompts:
        """A prompt for each target mask; r, how often the student is asked, is the same on all ranks."""
        generator = torch.Generator().manual_seed(derived_seed(run_seed(), "rounds", self.global_step))
        rounds = int(torch.randint(self.prompts.rounds + 1, (), generator=generator))
        rounds = rounds if self.prompts.enabled else 0
        self._log_rounds(rounds)
        boxed = torch.rand(len(target), device=target.device) < self.prompts.box_prob

        def ask(points: Tensor) -> tuple[Tensor, Tensor]:
            asked = Prompts(points, boxes, torch.zeros_like(boxed))
            decoded = self._decode(embedding, owner, asked)
            return decoded["masks"], decoded["iou"]

        boxes = target.new_zeros(len(target), 4, dtype=torch.float32)
        if not len(target):
            return Prompts(boxes.reshape(-1, 1, 4)[..., :2], boxes, boxed)
        points = hard_points(target, rounds, ask)
        return Prompts(points, noisy_boxes(target) if bool(boxed.any()) else boxes, boxed)

    def _log_rounds(self, rounds: int) -> None:
        if self._trainer is not None:
            self.log("train/rounds", float(rounds), batch_size=1)

    @staticmethod
    def prompts_of(outputs: dict[str, Tensor]) -> Prompts:
        """The prompts among the outputs of `compute`."""
        return Prompts(outputs["points"], outputs["boxes"], outputs["boxed"])

    def _decode(self, embedding: Tensor, owner: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """`masks`, `iou` and `tokens`, in chunks if wanted; of no prompt they are empty, and of the graph."""
        count = len(owner)
        if not count:  # every parameter takes part in the backward pass, on whichever rank
            one = Prompts(embedding.new_zeros(1, 1, 2), embedding.new_zeros(1, 4), owner.new_zeros(1).bool())
            decoded = decode_prompts(self.network, embedding, owner.new_zeros(1), one)
            return {name: values[:0] for name, values in decoded.items()}
        size = self.prompts_per_chunk
        if size is None or (count <= size and not torch.is_grad_enabled()):
            return decode_prompts(self.network, embedding, owner, prompts)
        parts = []
        for start in range(0, count, size):
            rows = slice(start, start + size)
            chosen = Prompts(*(part[rows] for part in prompts))
            arguments = (self.network, embedding, owner[rows], chosen)
            if torch.is_grad_enabled():
                parts.append(checkpoint(decode_prompts, *arguments, use_reentrant=False))
            else:
                parts.append(decode_prompts(*arguments))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """`mask`, focal and dice of the best of the three masks, and `iou`."""
        masks, target, valid = outputs["masks"], outputs["target"], outputs["valid"]
        if not len(masks):
            return {"mask": masks.sum(), "iou": outputs["iou"].sum()}
        return {
            "mask": self.mask_weight * reduced(mask_loss(masks, target, valid), self.mask_reduction),
            "iou": self.iou_weight * iou_loss(outputs["iou"], masks, target, valid),
        }

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        """Begin with no picture."""
        self._measured.reset()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Terms:
        """Measure the batch's pictures by the protocol."""
        return self._measured.update(self.network, self(batch["image"], batch["size"]), batch)

    test_step = validation_step

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`records` of each picture, masks of its `prompts` or, without any, of everything; `index`, `path`.

        A record has `segmentation` (compressed run lengths), `bbox`, `area`, `predicted_iou` and the prompt.
        """
        prompts = batch.get("prompts", [None] * len(batch["picture"]))
        records = [
            predicted(self.network, np.asarray(picture), given, self.protocol.everything, path)
            for picture, given, path in zip(batch["picture"], prompts, batch["path"], strict=True)
        ]
        return {"records": records, "index": batch["index"], "path": batch["path"]}

    def on_validation_epoch_end(self) -> None:
        """Log what the protocol measures as `val/<name>`."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log what the protocol measures as `test/<name>`."""
        self._report("test")

    def _report(self, stage: str) -> None:
        for name, value in self._measured.compute().items():  # the same on every rank
            self.log(f"{stage}/{name}", value, prog_bar=name == self._measured.main)
        self._measured.reset()
