"""Weights from elsewhere: the authors' released detectors, and ImageNet backbones of torchvision and timm."""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.deco.backbones import ConvNeXtTiny, ResNet50, ResNetD
from lightning_modules.deco.network import Deco, DetectionNetwork
from lightning_modules.deco.plus import DecoPlus
from lightning_modules.parts.weights import load_state, read_checkpoint, state_dict_of

_ALIAS = "deco_convnet.decoder.bbox_embed."  # the release has DECO's box heads under this name, too


def load_detector(network: DetectionNetwork, path: str | Path) -> None:
    """Load a whole detector, strictly: a file of the authors (of DECO+ its averaged weights), or one of ours.

    The authors' DECO files also hold their command line as an `argparse.Namespace`, which is allowed here and
    left alone; nothing else that is pickled is.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: it cannot be read safely, or does not fit; lists the keys.
    """
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = read_checkpoint(path)
    load_state(network, released_state(checkpoint, path), path)


def released_state(checkpoint: Mapping[str, Any], source: str | Path = "the checkpoint") -> dict[str, Tensor]:
    """A detector's state dict in a checkpoint, averaged weights first, without aliases."""
    averaged = checkpoint.get("ema")
    if isinstance(averaged, Mapping) and isinstance(averaged.get("module"), Mapping):
        checkpoint = averaged["module"]
    state = state_dict_of(dict(checkpoint), source=source)
    return {name: values for name, values in state.items() if not name.startswith(_ALIAS)}


def load_backbone(network: DetectionNetwork, source: str | Path) -> None:
    """Load an ImageNet classifier into the backbone alone.

    Args:
        network: changed in place.
        source: `pretrained` takes timm's (resnet50.tv_in1k, which are torchvision's first;
            convnext_tiny.fb_in1k; resnet18d.ra2_in1k or resnet50d.ra2_in1k), anything else is a file with
            such names, or with the backbone's own.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: the backbone has no ImageNet weights, or the file does not fit.
    """
    backbone: nn.Module
    if isinstance(network, Deco):
        backbone = network.backbone[0].body  # type: ignore[assignment]
    elif isinstance(network, DecoPlus):
        backbone = network.backbone
    else:
        raise MisconfigurationException(f"backbone_weights: {type(network).__name__} has no known backbone.")
    if source == "pretrained":
        state = _downloaded(backbone)
    else:
        state = state_dict_of(read_checkpoint(source), source=source)
    load_state(backbone, backbone_state(backbone, state), source)


def _downloaded(backbone: nn.Module) -> dict[str, Tensor]:
    names = {ResNet50: "resnet50.tv_in1k", ConvNeXtTiny: "convnext_tiny.fb_in1k"}
    name = names.get(type(backbone))
    if isinstance(backbone, ResNetD):
        name = "resnet18d.ra2_in1k" if backbone.channels[-1] == 512 else "resnet50d.ra2_in1k"
    if name is None:
        raise MisconfigurationException(
            f"backbone_weights: there are no ImageNet weights of {type(backbone).__name__}; leave them out."
        )
    return timm.create_model(name, pretrained=True).state_dict()


def backbone_state(backbone: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's state dict under the backbone's names, without the classifier; own names stay."""
    rules: tuple[tuple[str, str], ...] = ()
    if isinstance(backbone, ConvNeXtTiny):
        rules = _CONVNEXT
    elif isinstance(backbone, ResNetD):
        rules = _RESNET_D
    renamed: dict[str, Tensor] = {}
    for name, values in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = values
    if isinstance(backbone, ResNetD):
        renamed = _with_first_shortcut(backbone, renamed)
    own = backbone.state_dict()
    return {name: values for name, values in renamed.items() if name in own or not _is_extra(name)}


def _is_extra(name: str) -> bool:
    """Classifier, its norm, and the counters that frozen batch norms do not have."""
    return name.startswith(("fc.", "head.", "norm.")) or name.endswith("num_batches_tracked")


_CONVNEXT = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
)
_RESNET_D = (
    (r"^conv1\.0\.", "conv1.conv1_1.conv."),
    (r"^conv1\.1\.", "conv1.conv1_1.norm."),
    (r"^conv1\.3\.", "conv1.conv1_2.conv."),
    (r"^conv1\.4\.", "conv1.conv1_2.norm."),
    (r"^conv1\.6\.", "conv1.conv1_3.conv."),
    (r"^bn1\.", "conv1.conv1_3.norm."),
    (r"^layer(\d)\.(\d+)\.conv(\d)\.", r"layer\1.blocks.\2.branch\3.conv."),
    (r"^layer(\d)\.(\d+)\.bn(\d)\.", r"layer\1.blocks.\2.branch\3.norm."),
    (r"^layer1\.0\.downsample\.1\.", "layer1.blocks.0.short.conv."),
    (r"^layer1\.0\.downsample\.2\.", "layer1.blocks.0.short.norm."),
    (r"^layer([2-4])\.0\.downsample\.1\.", r"layer\1.blocks.0.short.conv.conv."),
    (r"^layer([2-4])\.0\.downsample\.2\.", r"layer\1.blocks.0.short.conv.norm."),
    (r"^layer1\.", "layers.0."),  # timm counts its stages from 1, the release from 0
    (r"^layer2\.", "layers.1."),
    (r"^layer3\.", "layers.2."),
    (r"^layer4\.", "layers.3."),
)


def _with_first_shortcut(backbone: ResNetD, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An identity for the projection of the first stage where timm's network (resnet18d) has none."""
    prefix = "layers.0.blocks.0.short."
    if any(name.startswith(prefix) for name in state):
        return state
    own = backbone.state_dict()
    shortcut = {name: own[name].clone() for name in own if name.startswith(prefix)}
    for name, values in shortcut.items():
        if name.endswith("conv.weight"):
            values.copy_(torch.eye(len(values))[:, :, None, None])
        else:
            values.fill_(1.0 if name.endswith(("norm.weight", "running_var")) else 0.0)
    return shortcut | state
