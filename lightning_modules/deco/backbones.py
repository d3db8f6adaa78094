"""Backbones: ResNet-50 and ConvNeXt-Tiny of DECO, a small one for CPUs, and DECO+'s ResNet-d."""

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from lightning_modules.deco.layers import ChannelNorm, ConvNeXtBlock, ConvNorm, init_convnext

BackboneName = Literal["resnet50", "convnext_tiny", "small"]


class ResNet50(nn.Module):
    """torchvision's ResNet-50 up to layer4, batch norms frozen; stem and layer1 are not trained.

    Args:
        dilation: layer4 keeps stride 16 by dilation 2 (the option DC5).
    """

    channels = 2048

    def __init__(self, dilation: bool = False) -> None:
        super().__init__()
        full = resnet50(norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, dilation])
        stem = ("conv1", "bn1", "relu", "maxpool")
        for name in (*stem, "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(full, name))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(layer in name for layer in ("layer2", "layer3", "layer4")))

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, H, W) to (batch, 2048, ceil(H / 32), ceil(W / 32))."""
        for part in self.children():
            images = part(images)
        return images


class ConvNeXtTiny(nn.Module):
    """ConvNeXt-Tiny without final norm and head."""

    channels = 768

    def __init__(self) -> None:
        super().__init__()
        widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6))
        shrink = [
            nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2))
            for before, after in pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *shrink])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        init_convnext(self)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, H, W) to (batch, 768, h, w): four floors of H / 4 / 2 / 2 / 2."""
        for shrink, stage in zip(self.downsample_layers, self.stages, strict=True):
            images = stage(shrink(images))
        return images


class SmallConvNet(nn.Module):
    """Four 3x3 convolutions with batch norm, stride 8 in all: for experiments on a CPU."""

    channels = 64

    def __init__(self) -> None:
        super().__init__()
        plan = ((3, 24, 2), (24, 48, 2), (48, 64, 2), (64, 64, 1))
        self.layers = nn.Sequential(
            *(ConvNorm(before, after, 3, stride, "relu") for before, after, stride in plan)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, H, W) to (batch, 64, ceil(H / 8), ceil(W / 8))."""
        return self.layers(images)


def build_backbone(name: BackboneName, dilation: bool = False) -> ResNet50 | ConvNeXtTiny | SmallConvNet:
    """A backbone of DECO with random weights.

    Raises:
        ValueError: no such backbone, or `dilation` for one that has none.
    """
    if name == "resnet50":
        return ResNet50(dilation)
    if dilation:
        raise ValueError(f"dilation: only backbone resnet50 has it, not {name}.")
    if name == "convnext_tiny":
        return ConvNeXtTiny()
    if name == "small":
        return SmallConvNet()
    raise ValueError(f"backbone: resnet50, convnext_tiny or small, not '{name}'.")


# DECO+


class ResNetD(nn.Module):
    """ResNet-d with 18 or 50 layers: three-convolution stem, average-pooled shortcuts.

    Args:
        depth: 18 (basic blocks) or 50 (bottlenecks).
        frozen: batch norms are frozen, and the three convolutions of the stem are not trained; None is how
            it was published: frozen for 50, not for 18.
    """

    def __init__(self, depth: Literal[18, 50] = 50, frozen: bool | None = None) -> None:
        super().__init__()
        plans = {18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3))}
        if depth not in plans:
            raise ValueError(f"depth: DECO+ has ResNet-d backbones of 18 and 50 layers, not {depth}.")
        block, depths = plans[depth]
        frozen = depth == 50 if frozen is None else frozen
        stem = ((3, 32, 2), (32, 32, 1), (32, 64, 1))
        self.conv1 = nn.Sequential(
            OrderedDict(
                (f"conv1_{place}", ConvNorm(before, after, 3, stride, "relu", frozen))
                for place, (before, after, stride) in enumerate(stem, start=1)
            )
        )
        if frozen:
            self.conv1.requires_grad_(False)
        widths, before = (64, 128, 256, 512), 64
        self.layers = nn.ModuleList()
        for stage, (width, count) in enumerate(zip(widths, depths, strict=True)):
            after = width * block.expansion
            inputs = [before] + [after] * (count - 1)
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            blocks = [
                block(channels, width, stride, place == 0, frozen)
                for place, (channels, stride) in enumerate(zip(inputs, strides, strict=True))
            ]
            self.layers.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
            before = after
        self.channels = tuple(width * block.expansion for width in widths[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(batch, 3, H, W) to features at strides 8, 16 and 32."""
        features = F.max_pool2d(self.conv1(images), 3, 2, 1)
        outputs = []
        for stage in self.layers:
            features = stage(features)
            outputs.append(features)
        return outputs[1:]


class _ResidualBlock(nn.Module):
    """Branches one after the other beside a shortcut, ReLU after the sum."""

    expansion: int

    def __init__(self, branches: list[ConvNorm], shortcut: nn.Module | None) -> None:
        super().__init__()
        for place, branch in enumerate(branches, start=1):
            self.add_module(f"branch{place}", branch)
        self._branches = [f"branch{place}" for place in range(1, len(branches) + 1)]
        self.short = shortcut

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels_in, h, w) to (batch, width * expansion, h / stride, w / stride)."""
        shortcut = features if self.short is None else self.short(features)
        for name in self._branches:
            features = getattr(self, name)(features)
        return F.relu(features + shortcut)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, projects: bool, frozen: bool) -> None:
        branches = [
            ConvNorm(channels, width, 3, stride, "relu", frozen),
            ConvNorm(width, width, 3, 1, None, frozen),
        ]
        super().__init__(branches, _shortcut(channels, width, stride, frozen) if projects else None)


class Bottleneck(_ResidualBlock):
    """1x1, 3x3 (with the stride), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, projects: bool, frozen: bool) -> None:
        branches = [
            ConvNorm(channels, width, 1, 1, "relu", frozen),
            ConvNorm(width, width, 3, stride, "relu", frozen),
            ConvNorm(width, 4 * width, 1, 1, None, frozen),
        ]
        super().__init__(branches, _shortcut(channels, 4 * width, stride, frozen) if projects else None)


def _shortcut(channels: int, out: int, stride: int, frozen: bool) -> nn.Module:
    """The projection of the first block of every stage; the paper's "d" pools before it."""
    projection = ConvNorm(channels, out, 1, 1, None, frozen)
    if stride == 1:
        return projection
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2, 2, 0, ceil_mode=True), conv=projection))
