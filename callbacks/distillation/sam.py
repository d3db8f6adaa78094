"""SAMTeacher: full-stage distillation of a promptable segmenter (TinySAM, section 2.3 of its paper)."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.distillation.base import FrozenTeacher, Teacher
from lightning_modules.base import Method
from lightning_modules.parts.frozen import weights_digest
from lightning_modules.parts.normalize import register_normalization
from lightning_modules.tinysam.frame import MEAN, STD, framed, inside
from lightning_modules.tinysam.losses import (
    Reduction,
    hard_mask_weight,
    mask_iou,
    mean_distance,
    output_loss,
    reduced,
)
from lightning_modules.tinysam.module import TinySAMModule
from lightning_modules.tinysam.network import SAM, load_sam, sam_vit
from lightning_modules.tinysam.prompts import Prompts, decode_prompts
from lightning_modules.tinysam.training import copy_decoder


class SAMTeacher(Teacher):
    """Distils a frozen SAM into the run's student: image embeddings, output tokens and masks.

    The teacher sees the student's images, and decodes the very prompts that the student is trained on. Its
    embeddings come from the batch where the data has them in a cache (`cache` of `SA1BDataModule`, which this
    teacher fills), and from its encoder otherwise. Both are rounded to float16, so it makes no difference.

    Terms are logged as `train/<name>/embedding`, `.../token` and `.../output`; beside them the teacher's and
    the student's mean IoU with the targets and the mean hard mask weight.

    Args:
        teacher: network, or timm's name of SAM's image encoder, `samvit_huge_patch16` or a smaller one, with
            SAM's own prompt encoder and mask decoder.
        weights: of the teacher, a file of SAM's names or of ours; None keeps what it has.
        copy_decoder: a student of random weights starts from the teacher's prompt encoder and mask decoder.
        name: of the objective.
        embedding_weight: the paper's alpha; 0 leaves the term out.
        token_weight: beta.
        output_weight: gamma.
        output_loss: `l1` of the mask logits, or `bce_dice` against the teacher's probabilities.
        hard_mask_weighting: weigh each mask by H, which is large where the teacher finds it and the student
            does not.
        mask_reduction: `mean` over the masks, or the paper's `sum`, where gamma depends on their number.
        eps: of H; unpublished.
    """

    def __init__(
        self,
        teacher: str | SAM = "samvit_huge_patch16",
        weights: str | Path | None = None,
        copy_decoder: bool = True,
        name: str = "sam_teacher",
        embedding_weight: float = 1.0,
        token_weight: float = 1.0,
        output_weight: float = 1.0,
        output_loss: Literal["l1", "bce_dice"] = "l1",
        hard_mask_weighting: bool = True,
        mask_reduction: Reduction = "mean",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(name)
        self.weights = weights
        self.terms = {"embedding": embedding_weight, "token": token_weight, "output": output_weight}
        if not any(self.terms.values()):
            raise ValueError("SAMTeacher: all of embedding_weight, token_weight and output_weight are 0.")
        self.output_loss: Literal["l1", "bce_dice"] = output_loss
        self.hard_mask_weighting = hard_mask_weighting
        self.mask_reduction: Reduction = mask_reduction
        self.eps = eps
        self.copy_decoder = copy_decoder
        self._teacher = teacher

    def student(self, module: LightningModule) -> nn.Module:
        """The run's promptable segmenter."""
        if not isinstance(module, TinySAMModule):
            raise MisconfigurationException(
                f"SAMTeacher distils into TinySAMModule, not {type(module).__name__}."
            )
        return module.network

    def build_teacher(self, module: LightningModule) -> FrozenTeacher:
        """SAM with its weights."""
        side = cast(SAM, self.student(module)).image_size
        network = sam_vit(self._teacher, side) if isinstance(self._teacher, str) else self._teacher
        if self.weights is None:
            rank_zero_warn("SAMTeacher: the teacher has random weights, as `weights` is null.")
        else:
            load_sam(network, self.weights)
        name = self._teacher if isinstance(self._teacher, str) else network.name
        return FrozenTeacher(SAMAnswers(network), name, "embeddings or masks")

    @property
    def source(self) -> tuple[Any, ...]:
        """Network and weights."""
        named = isinstance(self._teacher, str)
        return (self._teacher if named else id(self._teacher), str(self.weights))

    def build_objective(self, trainer: Trainer, module: Method) -> nn.Module:
        """The three terms."""
        return FullStageDistillation(self)

    def settings(self) -> dict[str, Any]:
        """The weights and switches of the terms."""
        switches = {"output_loss": self.output_loss, "mask_reduction": self.mask_reduction}
        return {**self.terms, **switches, "hard_mask_weighting": self.hard_mask_weighting, "eps": self.eps}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build what is not built yet, and offer the encoder to data that caches embeddings."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(pl_module, TinySAMModule)
            pl_module.encoder = EmbeddingEncoder(self.frozen)
            if self.copy_decoder and pl_module.weights_origin == "random":
                answers = cast(SAMAnswers, self.frozen.network)
                copy_decoder(answers.sam, pl_module.network, self.frozen.name)
                pl_module.weights_origin = f"random encoder, decoder of {self.frozen.name}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take it all back."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and isinstance(pl_module, TinySAMModule):
            pl_module.encoder = None


class SAMAnswers(nn.Module):
    """What a SAM says of a batch and its prompts.

    Args:
        sam: the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, sam: SAM) -> None:
        super().__init__()
        self.sam = sam
        register_normalization(self, MEAN, STD)

    def embed(self, images: Tensor, picture: Tensor) -> Tensor:
        """Embeddings (batch, 256, h, w), rounded to float16.

        Args:
            images: (batch, 3, side, side) in [0, 1].
            picture: where they are no padding, (batch, side, side).
        """
        return self.sam.image_encoder(framed(images, picture, self.mean, self.std)).half()

    def forward(
        self, batch: dict[str, Any], owner: Tensor | None = None, prompts: Prompts | None = None
    ) -> dict[str, Tensor]:
        """`embedding` (batch, 256, h, w), and `masks` (N, 3, h, w) and `tokens` (N, 5, 256) of N prompts.

        Args:
            batch: `image` and `size`; with a cache, `embedding` of those images that `cached` names.
            owner: (N,), the image of each prompt.
            prompts: None decodes nothing.
        """
        embedding = self._embeddings(batch).float()
        if prompts is None or owner is None:
            return {"embedding": embedding}
        decoded = decode_prompts(self.sam, embedding, owner, prompts)
        return {"embedding": embedding, "masks": decoded["masks"], "tokens": decoded["tokens"]}

    def _embeddings(self, batch: dict[str, Any]) -> Tensor:
        images, cached = batch["image"], batch.get("cached")
        if cached is not None and bool(cached.all()):
            return batch["embedding"]
        rest = slice(None) if cached is None else ~cached
        picture = inside(batch["size"], images.shape[-1])
        computed = self.embed(images[rest], picture[rest])
        if cached is None:
            return computed
        embedding = computed.new_empty(len(images), *computed.shape[1:])
        embedding[rest], embedding[cached] = computed, batch["embedding"]
        return embedding


class EmbeddingEncoder:
    """The teacher's encoder, as a cache of features asks for it.

    Args:
        teacher: of `SAMTeacher`.
    """

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.copy_decoder = copy_decoder
        self._teacher = teacher
        self._key: str | None = None

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        answers: Any = self._teacher.network
        return int(answers.sam.prompt_encoder.no_mask_embed.weight.shape[1])

    @property
    def key(self) -> str:
        """Name and weights of the encoder."""
        if self._key is None:
            answers: Any = self._teacher.network
            self._key = f"{self._teacher.name} {weights_digest(answers.sam.image_encoder)}"
        return self._key

    @property
    def model(self) -> str:
        """Name."""
        return self._teacher.name

    def to(self, device: Any) -> "EmbeddingEncoder":
        """Moves in place."""
        self._teacher.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of images (batch, 4, side, side): RGB in [0, 1], and 1 where there is no padding."""
        answers: Any = self._teacher.network
        with torch.no_grad():
            return answers.embed(images[:, :3], images[:, 3])


class FullStageDistillation(nn.Module):
    """The objective of `SAMTeacher`; has no parameters, and does not own the teacher."""

    def __init__(self, callback: SAMTeacher) -> None:
        super().__init__()
        self._callback = (callback,)  # in a tuple: no submodule

    def forward(
        self, module: TinySAMModule, batch: dict[str, Any], outputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted `embedding`, `token` and `output`; those of weight 0 are left out."""
        options = self._callback[0]
        owner, prompts = outputs["owner"], module.prompts_of(outputs)
        decodes = bool(options.terms["token"] or options.terms["output"])
        answers = options.frozen.once(
            batch["image"], lambda: options.frozen(batch, owner, prompts if decodes and len(owner) else None)
        )
        terms = {}
        if options.terms["embedding"]:
            terms["embedding"] = mean_distance(outputs["embedding"], answers["embedding"])
        if decodes and len(owner):
            terms |= self._decoded(options, module, outputs, answers)
        elif decodes:  # no prompt: nothing to learn, but every parameter takes part
            terms |= {name: outputs[key].sum() for name, key in (("token", "tokens"), ("output", "masks"))}
        return {name: options.terms[name] * value for name, value in terms.items() if options.terms[name]}

    def _decoded(
        self,
        options: SAMTeacher,
        module: TinySAMModule,
        outputs: dict[str, Tensor],
        answers: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        target, valid = outputs["target"], outputs["valid"]
        token = mean_distance(outputs["tokens"], answers["tokens"])
        output = output_loss(outputs["masks"], answers["masks"], valid, options.output_loss)
        both = (answers["masks"], outputs["masks"])
        teacher, student = (mask_iou(masks, target, valid).amax(dim=1) for masks in both)
        logged = {"teacher_iou": teacher.mean(), "student_iou": student.mean()}
        if options.hard_mask_weighting:
            hardness = hard_mask_weight(teacher, student, eps=options.eps)
            output, logged = hardness * output, {**logged, "hardness": hardness.mean()}
        module.log_dict({f"train/{options.name}/{key}": value for key, value in logged.items()}, batch_size=1)
        return {"token": token, "output": reduced(output, options.mask_reduction)}
