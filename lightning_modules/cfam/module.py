"""CFAM, IRRA-like settings and plain fine-tuning of CLIP for person retrieval, by the same switches."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_modules.base import Method, Terms
from lightning_modules.cfam.network import GranularityDecoder, IdentityHead, Matcher, small_classifier
from lightning_modules.cfam.objective import LossSettings, Objective, Sides
from lightning_modules.cfam.positions import Interpolation
from lightning_modules.cfam.towers import build_towers, load_towers, text_ends
from lightning_modules.parts.contracts import HasNumClasses, datamodule_of, optional
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.options import check_range
from lightning_modules.parts.retrieval import RetrievalMetrics
from lightning_modules.parts.selection import match

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RELEASED_LENGTH = 77
FACTORS = {
    "granularity_decoder*": 5.0,
    "matcher*": 5.0,
    "cid_head*": 5.0,
    "base_model.positional_embedding": 5.0,
    "*bias*": 2.0,
    "*classifier*": 5.0,
}
"""Factors of the learning rate; the last glob that matches wins (section 3)."""


class CFAM(Method):
    """Text-based person retrieval by CLIP with a shared granularity decoder (arXiv 2312.03441).

    The authors released no code: this is the design of the project's specification. Batches have `image`
    (B, 3, H, W) in [0, 1], `input_ids` (B, L) and `identity` (B,); evaluation reads a gallery of images and
    queries of captions one after the other.

    Args:
        model: open_clip's name, or a configuration as open_clip's files have it.
        pretrained: open_clip's tag (`openai`); None is random.
        init_from: a file to start from instead: CLIP's, IRRA's or one of this module.
        image_size: height and width, pixels.
        context_length: tokens of a caption; 168 for UFine6926.
        stride: of the image patches, pixels; None is the patch size.
        pos_embed_interpolation: of the image positions.
        num_classes: training identities; None asks the data.
        settings: terms of the loss, see `LossSettings`.
        num_queries: K.
        decoder_depth: blocks of the decoder.
        matcher_depth: blocks of the matcher.
        share_decoder: one decoder for both modalities.
        mask_text_padding: the decoder sees no token after the end of a caption.
        score: rank by the global similarity, or by it and the local one.
        alpha: weight of the global similarity in the fused score.
        msd_as_released: also log `mSD_released`, what the authors' script computes.
        optimizer: None is Adam at 1e-5 with weight decay 4e-5 and eps 1e-3.
        lr_scheduler: see `Method`; the authors' family has `WarmupCosine`.
        lr_multipliers: None is 5 for new parts and resized text positions, 2 for biases.
        no_decay: None is every bias.

    Raises:
        ValueError: an option is out of range.
    """

    inference = InferenceSpec(outputs=("image_features", "text_features"), unit="images")

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str | dict[str, Any] = "ViT-B-16",
        pretrained: str | None = "openai",
        init_from: Path | None = None,
        image_size: tuple[int, int] = (384, 128),
        context_length: int = 77,
        stride: int | None = None,
        pos_embed_interpolation: Interpolation = "bilinear",
        num_classes: int | None = None,
        settings: LossSettings = LossSettings(),
        num_queries: int = 16,
        decoder_depth: int = 2,
        matcher_depth: int = 2,
        share_decoder: bool = True,
        mask_text_padding: bool = True,
        score: Literal["global", "fused"] = "global",
        alpha: float = 0.8,
        msd_as_released: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_multipliers: dict[str, float] | None = None,
        no_decay: list[str] | None = None,
    ) -> None:
        optimizer = optimizer or partial(torch.optim.Adam, lr=1e-5, weight_decay=4e-5, eps=1e-3)
        super().__init__(optimizer, lr_scheduler, "epoch", lr_multipliers, no_decay)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "settings"])
        check_range("alpha", alpha, "[0, 1]")
        released = None if init_from is not None else pretrained
        self.base_model = build_towers(
            model, image_size, context_length, stride, released, pos_embed_interpolation
        )
        if released is not None:
            self.weights_origin = f"pretrained: {model}/{released}"
        if init_from is not None:
            load_towers(self.base_model, init_from, interpolation=pos_embed_interpolation)
            self.weights_origin = f"file: {init_from}"
        dim = self.base_model.dim
        self.settings = settings
        self._score, self._alpha, self._mask_padding = score, alpha, mask_text_padding
        self._default_factors = lr_multipliers is None
        self._default_decay = no_decay is None
        decodes = settings.decodes or score == "fused"
        new: Any = partial(GranularityDecoder, dim, num_queries, decoder_depth)
        self.granularity_decoder = new() if decodes else None
        self.granularity_decoder_text = new() if decodes and not share_decoder else None
        self.matcher = Matcher(dim, matcher_depth) if settings.match_weight else None
        self.cid_head: IdentityHead | None = None
        self.classifier: nn.Linear | None = None
        if num_classes is not None:
            self._build_heads(num_classes)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.retrieval = RetrievalMetrics(released=msd_as_released)

    def _build_heads(self, num_classes: int) -> None:
        self.num_classes = num_classes
        if self.settings.cid_weight and self.cid_head is None:
            self.cid_head = IdentityHead(self.base_model.dim, num_classes)
        if self.settings.id_weight and self.classifier is None:
            self.classifier = small_classifier(self.base_model.dim, num_classes)

    def setup(self, stage: str) -> None:
        """Build the heads over identities, whose number the data know.

        Raises:
            MisconfigurationException: nothing says how many identities are trained on.
        """
        needed = self.settings.cid_weight or self.settings.id_weight
        if stage != "fit" or not needed or self.cid_head is not None or self.classifier is not None:
            return
        data = optional(datamodule_of(self.trainer), HasNumClasses)
        if data is None:
            raise MisconfigurationException(
                "CFAM: num_classes: the data do not say how many identities they have; give it."
            )
        if data.num_classes is None:
            raise MisconfigurationException(
                "CFAM: num_classes: the data do not know their identities; give it."
            )
        self._build_heads(data.num_classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside of a `fit`, build the heads that the file has, or leave them out."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        resumes = self._trainer is not None and self.trainer.state.fn == "fit"
        for key in ("cid_head.classifier.weight", "classifier.weight"):
            if not resumes and key in state and self.cid_head is None and self.classifier is None:
                self._build_heads(len(state[key]) - key.startswith("cid_head"))
        if resumes:
            return
        parts = ("granularity_decoder.", "granularity_decoder_text.", "matcher.", "cid_head.", "classifier.")
        absent = tuple(part for part in parts if getattr(self, part[:-1]) is None)
        kept = {key: value for key, value in state.items() if not (absent and key.startswith(absent))}
        if len(kept) < len(state):
            rank_zero_info("CFAM: training-only parts of the checkpoint that are not used are left out.")
        checkpoint["state_dict"] = kept

    def normalize(self, image: Tensor) -> Tensor:
        """Images in [0, 1] by CLIP's statistics."""
        return (image - self.mean) / self.std

    def _sides(self, image: Tensor | None, ids: Tensor | None) -> dict[str, Tensor]:
        """`v`, `fv` of normalised images and `t`, `ft` of ids, as far as they are given and needed."""
        found: dict[str, Tensor] = {}
        if image is not None:
            tokens = self.base_model.image_tokens(image)
            found["v"] = tokens[:, 0]
            if self.granularity_decoder is not None:
                found["fv"] = self.granularity_decoder(tokens)
        if ids is not None:
            tokens, ends = self.base_model.text_tokens(ids), text_ends(ids)
            found["t"] = tokens[torch.arange(len(ids), device=ids.device), ends]
            if self.granularity_decoder is not None:
                places = torch.arange(ids.shape[1], device=ids.device)
                ignore = places > ends[:, None] if self._mask_padding else None
                decoder = self.granularity_decoder_text or self.granularity_decoder
                found["ft"] = decoder(tokens, ignore)
        return found

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`v`, `t` (B, D), and with a decoder `fv`, `ft` (B, K, D)."""
        return self._sides(self.normalize(batch["image"]), batch["input_ids"])

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """The weighted terms `gs`, `ls`, `m`, `cid`, `id`.

        Raises:
            ValueError: an identity is not among the training identities.
        """
        identity = batch["identity"]
        if (self.cid_head is not None or self.classifier is not None) and (
            int(identity.max()) >= self.num_classes or int(identity.min()) < 0
        ):
            raise ValueError(
                f"identity {int(identity.max())} of a batch is not below num_classes={self.num_classes}."
            )
        objective = Objective(self.settings, self.matcher, self.cid_head, self.classifier)
        terms = objective(Sides(identity=identity, **outputs))
        if self._trainer is not None:
            self.log_dict(
                {f"train/{key}": value for key, value in objective.accuracies.items()}, batch_size=1
            )
        return terms

    def _vector(self, pooled: Tensor, queries: Tensor | None) -> Tensor:
        vector = F.normalize(pooled.float(), dim=-1)
        if self._score == "global" or queries is None:
            return vector
        local = F.normalize(queries.float(), dim=-1).flatten(1)
        share = (1 - self._alpha) / queries.shape[1]
        return torch.cat([self._alpha**0.5 * vector, share**0.5 * local], dim=1)

    def encode_image(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to unit vectors (B, D), or (B, D (1 + K)) of the fused score."""
        if self._score == "global":
            return self._vector(self.base_model.image_tokens(image)[:, 0], None)
        found = self._sides(image, None)
        return self._vector(found["v"], found["fv"])

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to unit vectors (B, D), or (B, D (1 + K)) of the fused score."""
        if self._score == "global":
            tokens = self.base_model.text_tokens(ids)
            return self._vector(tokens[torch.arange(len(ids), device=ids.device), text_ends(ids)], None)
        found = self._sides(None, ids)
        return self._vector(found["t"], found["ft"])

    def forward(self, image: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Retrieval vectors of images in [0, 1] and of captions."""
        return self.encode_image(self.normalize(image)), self.encode_text(input_ids)

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`image` and `input_ids`."""
        return {key: batch[key] for key in ("image", "input_ids") if key in batch}

    def _encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "image" in batch:
            return {"features": self.encode_image(self.normalize(batch["image"]))}
        return {"features": self.encode_text(batch["input_ids"])}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Collect features of the gallery or of the queries."""
        found = self._encode(batch)
        side: Literal["gallery", "queries"] = "gallery" if "image" in batch else "queries"
        self.retrieval.update(side, found["features"], batch["identity"], batch["index"])
        return found

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all ranks, equal on each."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """The same for the test split."""
        self._log("test")

    def _log(self, split: str) -> None:
        self.retrieval.ignore_unmatched = self.trainer.sanity_checking
        if self.retrieval.ready:
            values = self.retrieval.compute()
            self.log_dict({f"{split}/{name}": value for name, value in values.items()}, sync_dist=False)
        self.retrieval.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """`features` and `index` of gallery images (`path`) or of queries (`caption`)."""
        names = ("path", "caption", "identity")
        extra: dict[str, Any] = {key: batch[key] for key in names if key in batch}
        return {**self._encode(batch), "index": batch["index"], **extra}

    def parameter_groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """See `Method`; without options of one's own the factors are `FACTORS`, and biases do not decay."""
        named = list(parameters)
        trainable = [name for name, parameter in named if parameter.requires_grad]
        if self._default_factors:
            self.lr_multipliers = {
                glob: factor for glob, factor in FACTORS.items() if _found(trainable, glob)
            }
            if len(self.base_model.positional_embedding) == RELEASED_LENGTH:
                self.lr_multipliers.pop("base_model.positional_embedding", None)
        if self._default_decay:
            self.no_decay = ["*bias*"]
        return super().parameter_groups(named)


def _found(names: list[str], glob: str) -> bool:
    try:
        return bool(match(names, [glob], "lr_multipliers"))
    except ValueError:
        return False
