"""CLIPTeacher: a CLIP teaches a smaller one its features, its similarities and its affinities."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.distillation.base import FrozenTeacher, Teacher
from lightning_modules.base import Method
from lightning_modules.lightclip import LightCLIP
from lightning_modules.parts.normalize import Statistics, normalized

OPENAI = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class CLIPTeacher(Teacher):
    """Distils a frozen CLIP into the run's `LightCLIP`; both read the same pictures and captions.

    Terms are logged as `train/<name>/feature`, `.../similarity` and `.../affinity`. They are of this rank's
    batch. Captions are CLIP's tokens for both.

    Args:
        teacher: open_clip's or transformers' name (or a folder), or a network with `encode_image` and
            `encode_text`.
        weights: open_clip's tag, such as `openai`; None takes those of a folder, or random ones.
        source: where `teacher` is from.
        name: of the objective.
        feature_weight: of the squared distance of unit features, mean over the batch and both sides; where
            widths differ a linear map of the student's is learned (CLIP-KD's feature distillation).
        similarity_weight: of the mean squared difference of the cosines of all pictures and captions.
        affinity_weight: of the cross-entropies of the softmaxed similarities, both ways (TinyCLIP's affinity
            mimicking).
        temperature: of the teacher's affinities and the student's; None: each its own.
        image_size: side that the teacher sees, pixels; None: its own where it says one.
    """

    def __init__(
        self,
        teacher: str | nn.Module = "ViT-B-16",
        weights: str | None = "openai",
        source: Literal["open_clip", "transformers"] = "open_clip",
        name: str = "clip_teacher",
        feature_weight: float = 1.0,
        similarity_weight: float = 1.0,
        affinity_weight: float = 1.0,
        temperature: float | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__(name)
        self.terms = {"feature": feature_weight, "similarity": similarity_weight, "affinity": affinity_weight}
        if min(self.terms.values()) < 0 or not any(self.terms.values()):
            raise ValueError(
                "CLIPTeacher: feature_weight, similarity_weight and affinity_weight must not be negative, "
                "nor all 0."
            )
        if temperature is not None and temperature <= 0:
            raise ValueError(f"CLIPTeacher: temperature={temperature}: it must be positive.")
        if source not in ("open_clip", "transformers"):
            raise ValueError(f"CLIPTeacher: source={source}: it must be open_clip or transformers.")
        self._teacher, self.weights, self.origin = teacher, weights, source
        self.temperature, self.image_size = temperature, image_size

    def student(self, module: LightningModule) -> nn.Module:
        """The run's two towers.

        Raises:
            MisconfigurationException: the module is another method.
        """
        if not isinstance(module, LightCLIP):
            raise MisconfigurationException(
                f"CLIPTeacher distils into LightCLIP, not {type(module).__name__}."
            )
        return module.network

    def build_teacher(self, module: LightningModule) -> FrozenTeacher:
        """The teacher with its weights."""
        name = self._teacher if isinstance(self._teacher, str) else type(self._teacher).__name__
        network: Any = self._teacher
        if isinstance(self._teacher, str) and self.origin == "open_clip":
            import open_clip

            network = open_clip.create_model(self._teacher, pretrained=self.weights)
        elif isinstance(self._teacher, str):
            from transformers import CLIPModel

            network = CLIPModel.from_pretrained(self._teacher, trust_remote_code=False)
        return FrozenTeacher(CLIPAnswers(network, self.image_size), name, "features")

    @property
    def source(self) -> tuple[Any, ...]:
        """Network, weights and size."""
        named = isinstance(self._teacher, str)
        return (self._teacher if named else id(self._teacher), self.weights, self.origin, self.image_size)

    def settings(self) -> dict[str, Any]:
        """Weights of the terms, and the temperature."""
        return {**self.terms, "temperature": self.temperature}

    def build_objective(self, trainer: Trainer, module: Method) -> nn.Module:
        """The terms, with the maps of features of another width."""
        assert isinstance(module, LightCLIP)
        answers: Any = self.frozen.network
        return CLIPDistillation(self, module.network.text_projection.shape[1], answers.width(self.frozen))


class CLIPAnswers(nn.Module):
    """What a CLIP of open_clip or transformers says of pictures and captions.

    Args:
        clip: the network.
        image_size: side that it sees; None: its own.
    """

    def __init__(self, clip: nn.Module, image_size: int | None = None) -> None:
        super().__init__()
        self.clip: Any = clip
        self.hugging = hasattr(clip, "get_image_features")
        config: Any = getattr(clip, "config", None)
        if self.hugging:
            side: Any = config.vision_config.image_size
            self.length: int = config.text_config.max_position_embeddings
        else:
            side = getattr(getattr(clip, "visual", None), "image_size", None)
            self.length = int(getattr(clip, "context_length", 0))
        self.side = image_size or (side[0] if isinstance(side, (tuple, list)) else side)
        visual: Any = getattr(clip, "visual", None)
        mean, std = (getattr(visual, name, None) for name in ("image_mean", "image_std"))
        self.statistics = OPENAI if mean is None or std is None else Statistics(tuple(mean), tuple(std))

    def width(self, teacher: FrozenTeacher) -> int:
        """Of its features."""
        side = self.side or 224
        device = next(self.clip.parameters()).device
        ids = torch.zeros(1, self.length or 77, dtype=torch.int64, device=device)
        ids[0, :2] = torch.tensor([49406, 49407])
        return teacher(torch.zeros(1, 3, side, side, device=device), ids)["image"].shape[1]

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Unit vectors `image` and `text` (batch, width), and the `scale` of its cosines.

        Args:
            images: (batch, 3, height, width) in [0, 1].
            ids: (batch, length).
        """
        if self.side is not None and images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        images = normalized(images, *self.statistics)
        if self.length:
            ids = F.pad(ids, (0, max(self.length - ids.shape[1], 0)))[:, : self.length]
        if self.hugging:
            found = [_tensor(self.clip.get_image_features(images)), _tensor(self.clip.get_text_features(ids))]
        else:
            found = [self.clip.encode_image(images), self.clip.encode_text(ids)]
        image, text = (F.normalize(side.float(), dim=-1) for side in found)
        return {"image": image, "text": text, "scale": self.clip.logit_scale.exp().float()}


def _tensor(output: Any) -> Tensor:
    """Transformers 5 wraps projected features in an output with `pooler_output`."""
    return output if isinstance(output, Tensor) else output.pooler_output


def affinity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's affinities with the teacher's, mean of both ways (TinyCLIP).

    Args:
        student: scaled cosines (pictures, captions).
        teacher: the same of the teacher.
    """
    ways = ((student, teacher), (student.T, teacher.T))
    return sum((F.cross_entropy(ours, theirs.softmax(1)) for ours, theirs in ways), student.new_zeros(())) / 2


class CLIPDistillation(nn.Module):
    """The objective of `CLIPTeacher`; does not own the teacher.

    Args:
        callback: its options.
        width: of the student's features.
        wanted: of the teacher's.
    """

    def __init__(self, callback: CLIPTeacher, width: int, wanted: int) -> None:
        super().__init__()
        self._callback = (callback,)  # in a tuple: no submodule
        maps = bool(callback.terms["feature"]) and width != wanted
        self.maps = nn.ModuleDict(
            {side: nn.Linear(width, wanted, bias=False) for side in ("image", "text") if maps}
        )

    def forward(
        self, module: LightCLIP, batch: dict[str, Any], outputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted `feature`, `similarity` and `affinity`; those of weight 0 are left out."""
        options = self._callback[0]
        frozen = options.frozen
        answers = frozen.once(batch["image"], lambda: frozen(batch["image"], batch["input_ids"]))
        raw = {side: outputs[f"{side}_features"] for side in ("image", "text")}
        ours = {side: F.normalize(feature.float(), dim=-1) for side, feature in raw.items()}
        cosine, wanted = ours["image"] @ ours["text"].T, answers["image"] @ answers["text"].T
        terms = {}
        if options.terms["feature"]:
            mapped = {
                side: F.normalize(self.maps[side](raw[side]).float(), dim=-1)
                if len(self.maps)
                else ours[side]
                for side in raw
            }
            terms["feature"] = torch.stack(
                [(mapped[side] - answers[side]).square().sum(1).mean() for side in raw]
            ).mean()
        if options.terms["similarity"]:
            terms["similarity"] = F.mse_loss(cosine, wanted)
        if options.terms["affinity"]:
            own, its = module.temperature, answers["scale"]
            if options.temperature is not None:
                own = its = torch.tensor(1 / options.temperature, device=cosine.device)
            terms["affinity"] = affinity_loss(own * cosine, its * wanted)
        return {name: options.terms[name] * value for name, value in terms.items()}
