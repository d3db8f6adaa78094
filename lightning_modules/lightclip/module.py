"""The training of LightCLIP: three losses of one picture pass, one text pass and one masked pass."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_modules.base import Terms
from lightning_modules.lightclip.evaluation import ImageTextMethod
from lightning_modules.lightclip.losses import Softening, instance_loss, token_loss
from lightning_modules.lightclip.matching import Matching, token_scores
from lightning_modules.lightclip.network import LARGEST_SCALE, LightCLIPNet, similarity_scale
from lightning_modules.lightclip.words import IGNORED, end_positions, mask_tokens, word_mask
from lightning_modules.parts.cached import cached_features
from lightning_modules.parts.distributed import gather_with_gradient, is_distributed
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.normalize import Statistics, normalized
from lightning_modules.parts.options import check

IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class LightCLIP(ImageTextMethod):
    """Contrastive, token and masked-word losses of light towers (arXiv 2312.00674, partly reconstructed).

    A batch has `image` (batch, 3, height, width) in [0, 1] and `input_ids` (batch, length). A part
    whose weight is 0 is not built. With weights (1, 0, 0) and `softening.end` 0 this is CLIP.

    Args:
        network: options of `LightCLIPNet`; `align_width` and `mlm` follow the weights.
        w_ins: weight of the instance loss.
        w_tok: weight of the token loss, whose negatives are of this rank.
        w_mlm: weight of the masked-word loss.
        softening: of the labels.
        matching: of patches and words.
        mask_probability: of a word, in (0, 1).
        micro_batch: samples that are computed at once, on one device; None: the batch.
        options: optimiser, schedule and parameter groups, see `Method`.

    Raises:
        OptionError: an option is out of its range.
    """

    inference = InferenceSpec(outputs=("features",), unit="samples")

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        w_ins: float = 1.0,
        w_tok: float = 1.0,
        w_mlm: float = 0.5,
        softening: Softening = Softening(),
        matching: Matching = Matching(),
        mask_probability: float = 0.15,
        micro_batch: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value in (("w_ins", w_ins), ("w_tok", w_tok), ("w_mlm", w_mlm)):
            check(value >= 0, name, value, "not negative")
        check(w_ins + w_tok + w_mlm > 0, "w_ins", w_ins, "positive where w_tok and w_mlm are 0")
        check(0 < mask_probability < 1, "mask_probability", mask_probability, "in (0, 1)")
        check(micro_batch is None or micro_batch >= 1, "micro_batch", micro_batch, "null or at least 1")
        softening.check()
        matching.check()
        chosen = {**(network or {}), "mlm": w_mlm > 0}
        if not w_tok:
            chosen["align_width"] = 0
        self.network = LightCLIPNet(**chosen)
        self.w_ins, self.w_tok, self.w_mlm = w_ins, w_tok, w_mlm
        self.softening, self.matching = softening, matching
        self.mask_probability, self.micro_batch = mask_probability, micro_batch

    def on_fit_start(self) -> None:
        """Say which reading of the matching this run uses."""
        super().on_fit_start()
        terms = {"instance": self.w_ins, "token": self.w_tok, "masked words": self.w_mlm}
        said = ", ".join(f"{weight:g} x {name}" for name, weight in terms.items() if weight)
        rank_zero_info(f"LightCLIP trains {said}; labels are softened up to {self.softening.end:g}.")
        if self.w_tok:
            rank_zero_info(f"LightCLIP matches patches and words by: {self.matching.describe()}.")

    @property
    def alpha(self) -> float:
        """What the negatives get of a label now: a function of the epoch, or of the step."""
        if self._trainer is None:
            return self.softening.alpha(0.0)
        if self.softening.unit == "step":
            return self.softening.alpha(
                self.global_step / max(self.trainer.estimated_stepping_batches - 1, 1)
            )
        return self.softening.alpha(self.current_epoch / max((self.trainer.max_epochs or 1) - 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the trunk expects them."""
        return normalized(images, *IMAGENET)

    def encode_image(self, image: Tensor) -> Tensor:
        """Pictures in [0, 1] to unit vectors (batch, embed_dim)."""
        return self.network(self.normalize(image))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Token ids (batch, length) to unit vectors (batch, embed_dim)."""
        return self.network(input_ids)

    @property
    def temperature(self) -> Tensor:
        """Factor of the cosines, at most 100."""
        return similarity_scale(self.network.logit_scale)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the network knows, the mask not counted."""
        return self.network.vocabulary

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`image` and `input_ids`, as far as the batch has them."""
        return {key: batch[key] for key in ("image", "input_ids") if key in batch}

    def masked(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Masked ids and labels (batch, length); random numbers of the step's generator."""
        words = word_mask(ids, end_positions(ids, self.network.end))
        select, kind = torch.rand(2, *ids.shape, device=ids.device)
        random_ids = torch.randint(min(self.network.start, self.network.end), ids.shape, device=ids.device)
        return mask_tokens(ids, words, select, kind, random_ids, self.network.mask_id, self.mask_probability)

    def compute(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`image_features`, `text_features` and what the other losses need, see `encode`."""
        inputs = {"image": batch["image"], "input_ids": batch["input_ids"]}
        if self.w_mlm and self.training:
            inputs["masked"], inputs["labels"] = self.masked(batch["input_ids"])
        if self.micro_batch is None or not torch.is_grad_enabled():
            return self.encode(inputs)
        return cached_features(self.encode, inputs, self.micro_batch, self.network)

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Per sample: both features; `patches` and `words`; sum `masked_nll` and number `masked_count`."""
        net, ids = self.network, batch["input_ids"]
        maps = net.visual.maps(self.normalize(batch["image"]))
        hidden, ends = net.text_hidden(ids), end_positions(ids, net.end)
        found = {"image_features": net.visual.project(maps[-1]), "text_features": net.pool(hidden, ends)}
        if net.token_align is not None:
            found |= {
                "patches": net.token_align.patches(maps[-1]),
                "words": net.token_align.words(hidden),
                "valid": word_mask(ids, ends),
            }
        if "masked" in batch:
            labels = batch["labels"]
            selected = labels != IGNORED
            fused = net.text_hidden(batch["masked"], maps)
            nll = F.cross_entropy(
                net.word_logits(fused[selected]).float(), labels[selected], reduction="none"
            )
            row = selected.nonzero()[:, 0]
            found["masked_nll"] = nll.new_zeros(len(ids)).index_add(0, row, nll)
            found["masked_count"] = selected.sum(1)
        return found

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> Terms:
        """`instance` against all ranks, `token` and `masked` of this one; weighted."""
        net = self.network
        terms: dict[str, Any] = {}
        if self.w_ins:
            v, t = (F.normalize(outputs[f"{side}_features"].float(), dim=-1) for side in ("image", "text"))
            scale = self.temperature
            every = gather_with_gradient(v), gather_with_gradient(t)
            offset = torch.distributed.get_rank() * len(v) if is_distributed() else 0
            softening = self.alpha, self.softening.mode, self.softening.temperature
            terms["instance"] = self.w_ins * sum(instance_loss(v, t, scale, *softening, *every, offset)) / 2
        if net.token_align is not None:
            patches, words = outputs["patches"].float(), outputs["words"].float()
            scores = token_scores(patches, words, outputs["valid"], self.matching)
            scale = similarity_scale(net.token_align.logit_scale)
            terms["token"] = self.w_tok * token_loss(*scores, outputs["valid"].sum(1), scale)
        if "masked_nll" in outputs:
            count = outputs["masked_count"].sum().clamp(min=1)
            terms["masked"] = self.w_mlm * outputs["masked_nll"].sum() / count
        return terms

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep both temperatures in [1, 100]."""
        for part in (self.network, self.network.token_align):
            if part is not None:
                part.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
