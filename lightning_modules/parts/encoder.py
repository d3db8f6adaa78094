"""A frozen image encoder, any of timm's or open_clip's, that no checkpoint carries."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.parts.normalize import (
    Statistics,
    normalized,
    register_normalization,
    trained_statistics,
)
from lightning_modules.parts.weights import build_network, load_weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Channels = tuple[float, float, float]


class ImageEncoder(nn.Module):
    """Images to feature vectors: always in eval mode, never trained, in no state dict and no optimiser.

    The network is built when the first image arrives, so a run on cached features does not load it. It moves
    between devices with the module that holds it.

    open_clip gives the image embedding behind the projection, not normalised; timm the pooled features
    (`num_classes: 0`), or its head's output with `model_args: {num_classes: 768}`, as a CLIP tower of timm
    needs for the same embedding.

    Args:
        model: of open_clip (the paper's CLIP is `ViT-L-14-quickgelu`: plain `ViT-L-14` has another GELU) or
            of timm.
        source: which of the two.
        weights: a tag of open_clip, `pretrained` for timm's own, a file, or null: random, always the same.
        model_args: further arguments of timm's model.
        mean: per-channel mean of the normalisation; null takes the model's own.
        std: per-channel standard deviation; null takes the model's own.
        seed: of random weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        source: Literal["open_clip", "timm"] = "open_clip",
        weights: str | None = "openai",
        model_args: dict[str, Any] | None = None,
        mean: Channels | None = None,
        std: Channels | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.source = source
        self.weights = weights
        self.model_args = model_args or {}
        self.seed = seed
        self._hidden: list[nn.Module] = []  # a list: no submodule
        if source == "open_clip":
            self.width, statistics = _describe_clip(model, weights, self.model_args)
        else:
            self.width, statistics = _describe_timm(model, self.model_args)
        register_normalization(self, mean or statistics.mean, std or statistics.std)

    @property
    def key(self) -> str:
        """What the features depend on, as text: model, weights (a file by its contents), normalisation."""
        parts: dict[str, Any] = {"source": self.source, "model": self.model, "weights": self.weights}
        if self.weights is None:
            parts["seed"] = self.seed
        elif Path(self.weights).is_file():
            parts["weights"] = _digest(Path(self.weights))
        statistics = {name: getattr(self, name).flatten().tolist() for name in ("mean", "std")}
        return json.dumps({**parts, "model_args": self.model_args, **statistics}, sort_keys=True)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, width) of images (batch, 3, height, width) in [0, 1]; without a graph."""
        with torch.no_grad():
            features = self.network(normalized(images, self.mean, self.std))
        if features.ndim != 2 or features.shape[1] != self.width:
            raise MisconfigurationException(
                f"The encoder {self.model} gives {tuple(features.shape)}, not (batch, {self.width})."
            )
        return features

    @property
    def network(self) -> nn.Module:
        """The encoder itself, built when it is asked for."""
        if not self._hidden:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                network = self._build()
            self._hidden.append(network.eval().requires_grad_(False).to(self.mean.device))
        return self._hidden[0]

    def _build(self) -> nn.Module:
        file = self.weights is not None and Path(self.weights).is_file()
        if self.source == "timm":
            options = {"num_classes": 0, **self.model_args}
            network = build_network(self.model, None if file else self.weights, **options)
            if file and self.weights is not None:
                load_weights(network, self.weights, partial(_without_classifier, network))
            return network
        import open_clip

        known = open_clip.list_pretrained_tags_by_model(self.model)
        if self.weights is not None and not file and self.weights not in known:
            raise MisconfigurationException(
                f"encoder.weights: '{self.weights}' is neither a file nor a tag that open_clip has for "
                f"{self.model}: {', '.join(known) or 'none'}."
            )
        clip = open_clip.create_model(self.model, pretrained=None if file else self.weights)
        if file and self.weights is not None:
            load_weights(clip, self.weights)
        return clip.visual

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ImageEncoder":
        for network in self._hidden:
            network._apply(fn)
        return super()._apply(fn, recurse)


def _digest(file: Path) -> str:
    """The beginning of the SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _without_classifier(network: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's state for a network that was built without one."""
    names = network.default_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    own = network.state_dict()
    return {key: value for key, value in state.items() if key in own or not key.startswith(prefixes)}


def _describe_clip(model: str, weights: str | None, model_args: dict[str, Any]) -> tuple[int, Statistics]:
    """Width of the embedding and the statistics of the normalisation, without building the network."""
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise MisconfigurationException(f"encoder.model: open_clip has no model '{model}'.")
    if model_args:
        raise MisconfigurationException("encoder.model_args is for timm; open_clip's models are fixed.")
    tagged = open_clip.get_pretrained_cfg(model, weights or "")
    return int(config["embed_dim"]), Statistics(tagged.get("mean", CLIP_MEAN), tagged.get("std", CLIP_STD))


def _describe_timm(model: str, model_args: dict[str, Any]) -> tuple[int, Statistics]:
    """Likewise; the network has shapes but no memory here."""
    network: Any
    with torch.device("meta"):
        network = build_network(model, None, **{"num_classes": 0, **model_args})
    width = network.num_classes or getattr(network, "head_hidden_size", None) or network.num_features
    return int(width), trained_statistics(network)
