"""Where student and teacher are tapped: the ends of four stages and the classifier's input, by module path in
timm.

Stage features come in two layouts: maps (B, C, H, W) and tokens (B, L, D). Channels-last maps of Swin-like
networks count as tokens (section 3.2 of the OFA-KD paper treats them so).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import timm.models as zoo
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_modules.parts.selection import match
from lightning_modules.parts.taps import FeatureTaps

STAGES = 4


@dataclass(frozen=True)
class StageShape:
    """Shape of a stage's feature for one sample.

    Attributes:
        channels: C of a map, D of tokens.
        height: of a map; for tokens their number L, prefix tokens included.
        width: of a map; 0 for tokens.
        prefix_tokens: class tokens at the front of L.
    """

    channels: int
    height: int
    width: int = 0
    prefix_tokens: int = 0

    @property
    def is_map(self) -> bool:
        """Whether the feature is (B, C, H, W) rather than (B, L, D)."""
        return self.width > 0

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return self.height

    @classmethod
    def of(cls, feature: Tensor, prefix_tokens: int = 0) -> "StageShape":
        """The shape of a batch's feature, a map (B, C, H, W) or tokens (B, L, D)."""
        if feature.ndim == 4:
            return cls(feature.shape[1], feature.shape[2], feature.shape[3])
        return cls(feature.shape[2], feature.shape[1], prefix_tokens=prefix_tokens)


@dataclass
class Features:
    """What one forward pass of a network leaves for the criteria.

    Attributes:
        logits: (B, K).
        stages: `{stage number: map (B, C, H, W) or tokens (B, L, D)}`, the un-normalised end of each stage
            asked for.
        penultimate: (B, d), the pooled, normalised vector that enters the classifier; None if nobody asked.
    """

    logits: Tensor
    stages: dict[int, Tensor]
    penultimate: Tensor | None = None


@dataclass(frozen=True)
class FeatureShapes:
    """Shapes of `Features`, known before training.

    Attributes:
        stages: `{stage number: shape}`.
        penultimate: width d of the vector that enters the classifier.
        num_classes: K.
    """

    stages: dict[int, StageShape]
    penultimate: int
    num_classes: int


def stage_paths(network: nn.Module, name: str = "network") -> list[str]:
    """Module paths of the four stage ends of a timm network.

    The families of the paper (ResNet, MobileNetV2 and its like, ConvNeXt, ViT and DeiT, BEiT, Swin, Mixer and
    ResMLP) have rules; any other timm network falls back to the last four entries of its `feature_info`, with
    a line of log.

    Args:
        network: built by timm.
        name: how the user calls it, for messages.

    Raises:
        ValueError: the network has no such description; the user must name the paths.
    """
    for kinds, rule in _FAMILIES:
        if isinstance(network, kinds):
            return rule(network)
    entries = _feature_info(network)
    if len(entries) < STAGES:
        raise ValueError(
            f"{name}: the family of {type(network).__name__} is unknown, and its feature_info has "
            f"{len(entries)} of {STAGES} stages. Name the stage ends yourself: `student_taps` or "
            f"`teacher_taps`, {STAGES} module paths."
        )
    isotropic = len({entry["reduction"] for entry in entries}) == 1
    last = range(len(entries) - STAGES, len(entries))
    chosen = [entries[place]["module"] for place in (_ends(len(entries)) if isotropic else last)]
    rank_zero_info(f"{name}: {type(network).__name__} has no rule; its feature_info gives {chosen}.")
    return chosen


def _feature_info(network: nn.Module) -> list[dict[str, Any]]:
    info = getattr(network, "feature_info", None) or []
    return list(info) if isinstance(info, list) else list(info.info)


def _numbered(container: str) -> Callable[[nn.Module], list[str]]:
    return lambda network: [f"{container}.{i}" for i in range(STAGES)]


def _blocks(network: nn.Module) -> list[str]:
    depth = len(network.get_submodule("blocks"))  # type: ignore[arg-type]
    if depth < STAGES:
        raise ValueError(
            f"{type(network).__name__} has {depth} blocks, too few for {STAGES} stages: name the taps."
        )
    return [f"blocks.{place}" for place in _ends(depth)]


def _ends(depth: int) -> list[int]:
    """Places of the stage ends among equal blocks: 1, 3, 9, 11 of 12 (as Swin-T), else in proportion."""
    ends: list[int] = []
    for stage, twelfths in enumerate((2, 4, 10, 12)):
        earliest = ends[-1] + 1 if ends else 0
        latest = depth - STAGES + stage
        ends.append(min(max(round(depth * twelfths / 12) - 1, earliest), latest))
    return ends


def _efficientnet(network: nn.Module) -> list[str]:
    """The stages of feature_info, but the head's map (convolution, BN, activation) as the last."""
    return [*[entry["module"] for entry in _feature_info(network)][-STAGES:-1], "bn2"]


_FAMILIES: list[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module], list[str]]]] = [
    ((zoo.resnet.ResNet,), lambda network: [f"layer{i}" for i in range(1, STAGES + 1)]),
    ((zoo.efficientnet.EfficientNet,), _efficientnet),
    ((zoo.convnext.ConvNeXt,), _numbered("stages")),
    ((zoo.swin_transformer.SwinTransformer,), _numbered("layers")),
    ((zoo.vision_transformer.VisionTransformer, zoo.beit.Beit, zoo.mlp_mixer.MlpMixer), _blocks),
]


def classifier_path(network: nn.Module, name: str = "network") -> str:
    """Module path of the classifier, whose input is the penultimate feature.

    timm's `get_classifier` answers; other networks must end in an `nn.Linear`, the last one defined.

    Raises:
        ValueError: there is no classifier.
    """
    getter = getattr(network, "get_classifier", None)
    wanted = getter() if getter is not None else None
    if isinstance(wanted, tuple):  # distilled DeiT has two heads; the class token enters the first
        wanted = wanted[0]
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if getter is None and linear:
        return linear[-1]
    for path, module in network.named_modules():
        if path and module is wanted and not isinstance(module, nn.Identity):
            return path
    raise ValueError(
        f"{name}: {type(network).__name__} has no classifier to take the penultimate feature from."
    )


class NetworkTaps(FeatureTaps):
    """A recorder of `Features`: it knows a network's stages and classifier, and their layouts.

    Recording starts when the network's own forward starts and ends with `collect`, see `FeatureTaps`.

    Args:
        network: a timm network, or any with `paths` given.
        paths: module paths of the four stage ends; None finds them, see `stage_paths`.
        name: how the user calls the network, for messages.
        training_only: record only in training mode with gradients, so that validation costs nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        paths: Sequence[str] | None = None,
        name: str = "network",
        training_only: bool = False,
    ) -> None:
        super().__init__(network, each_pass=True, training_only=training_only)
        self.name = name
        self._given = list(paths) if paths is not None else None
        self._prefix_tokens = 0 if self._channels_last else int(getattr(network, "num_prefix_tokens", 0))
        self._has_class_token = bool(getattr(network, "has_class_token", self._prefix_tokens > 0))
        self._stages: dict[int, str] = {}

    @property
    def _channels_last(self) -> bool:
        return getattr(self._root, "output_fmt", "NCHW") == "NHWC"

    def watch(self, stages: Sequence[int], penultimate: bool) -> None:
        """Ask for features; further calls add to what was asked for.

        Raises:
            ValueError: the network's stages or classifier cannot be found, or a path matches nothing.
        """
        if stages and not self._stages:
            paths = self._given if self._given is not None else stage_paths(self._root, self.name)
            known = [path for path, _ in self._root.named_modules() if path]
            for path in paths:
                match(known, [path], f"{self.name}: taps")
            self._stages = dict(enumerate(paths, start=1))
        for stage in stages:
            if stage not in self._stages:
                raise ValueError(
                    f"{self.name}: stage {stage} has no tap; there are {len(self._stages)} stages."
                )
            self.tap(self._stages[stage], f"stage{stage}")
        if penultimate:
            self.tap(classifier_path(self._root, self.name), "penultimate", takes_input=True)

    def collect(self, logits: Tensor) -> Features:
        """Features of the forward pass that has just ended, in their common layouts; forgets them here.

        Raises:
            RuntimeError: the network did not run, or not through the modules that are watched.
        """
        try:
            recorded = self.take()
        except RuntimeError as error:
            raise RuntimeError(f"{self.name}: {error}") from None
        stages = {
            stage: self._common_layout(recorded[f"stage{stage}"])
            for stage in sorted(self._stages)
            if f"stage{stage}" in recorded
        }
        penultimate = recorded["penultimate"].flatten(1) if "penultimate" in recorded else None
        return Features(logits, stages, penultimate)

    def _common_layout(self, feature: Tensor) -> Tensor:
        if feature.ndim == 4:
            return feature.flatten(1, 2) if self._channels_last else feature
        if feature.ndim != 3:
            raise ValueError(
                f"{self.name}: a stage must give maps or tokens, not a shape {tuple(feature.shape)}."
            )
        return feature if self._has_class_token else feature[:, self._prefix_in(feature) :]

    def _prefix_in(self, feature: Tensor) -> int:
        """Prefix tokens of (B, L, D); none where L alone is a square (CaiT adds its class token late)."""
        patches = feature.shape[1] - self._prefix_tokens
        late = isqrt(patches) ** 2 != patches and isqrt(feature.shape[1]) ** 2 == feature.shape[1]
        return 0 if late else self._prefix_tokens

    def shapes(self, features: Features) -> FeatureShapes:
        """Shapes of features that `collect` gave."""
        stages = {
            stage: StageShape.of(f, self._prefix_in(f) if f.ndim == 3 and self._has_class_token else 0)
            for stage, f in features.stages.items()
        }
        width = 0 if features.penultimate is None else features.penultimate.shape[1]
        return FeatureShapes(stages, width, features.logits.shape[1])
