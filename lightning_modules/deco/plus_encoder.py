"""DECO+'s encoder: ConvNeXt blocks on the coarsest level, then RT-DETR's cross-scale fusion. Plain torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_modules.deco.layers import ConvNeXtBlock, ConvNorm, init_convnext


class RepBlock(nn.Module):
    """SiLU(BN(conv3x3) + BN(conv1x1)), which `fuse` turns into a single 3x3 convolution.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Same shape."""
        return F.silu(self.conv1(features) + self.conv2(features))

    def fused(self) -> nn.Sequential:
        """The same function in eval mode: one 3x3 convolution with bias, and SiLU."""
        square, point = _folded(self.conv1), _folded(self.conv2)
        assert square.bias is not None  # folding a norm makes one
        assert point.bias is not None
        square.weight = nn.Parameter(square.weight + F.pad(point.weight, (1, 1, 1, 1)))
        square.bias = nn.Parameter(square.bias + point.bias)
        return nn.Sequential(square, nn.SiLU())


def _folded(branch: ConvNorm) -> nn.Conv2d:
    """A branch's convolution with its norm folded in."""
    assert isinstance(branch.norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(branch.conv, branch.norm)


class CSPLayer(nn.Module):
    """Cross-stage partial layer: `conv3(RepBlocks(conv1(x)) + conv2(x))`.

    Args:
        channels_in: of the input.
        channels_out: of the output.
        expansion: inner width as a share of `channels_out`; at 1 there is no conv3.
        blocks: number of Rep blocks.
    """

    def __init__(self, channels_in: int, channels_out: int, expansion: float = 1.0, blocks: int = 3) -> None:
        super().__init__()
        hidden = int(channels_out * expansion)
        self.conv1 = ConvNorm(channels_in, hidden, 1, activation="silu")
        self.conv2 = ConvNorm(channels_in, hidden, 1, activation="silu")
        self.bottlenecks = nn.Sequential(*(RepBlock(hidden) for _ in range(blocks)))
        same = hidden == channels_out
        self.conv3: nn.Module = (
            nn.Identity() if same else ConvNorm(hidden, channels_out, 1, activation="silu")
        )

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels_in, h, w) to (batch, channels_out, h, w)."""
        return self.conv3(self.bottlenecks(self.conv1(features)) + self.conv2(features))


class PlusEncoder(nn.Module):
    """Three levels of the backbone to three levels of one width.

    Args:
        channels: of the backbone's levels, fine to coarse.
        hidden_dim: width of every level afterwards.
        depth: ConvNeXt blocks on the coarsest level.
        kernel: side of their depthwise kernels.
        expansion: of the CSP layers.
        layer_scale: initial value of the blocks' gamma.
    """

    def __init__(
        self,
        channels: Sequence[int],
        hidden_dim: int = 256,
        depth: int = 4,
        kernel: int = 7,
        expansion: float = 1.0,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, hidden_dim, 1, bias=False), nn.BatchNorm2d(hidden_dim))
            for width in channels
        )
        blocks = nn.Sequential(*(ConvNeXtBlock(hidden_dim, kernel, layer_scale) for _ in range(depth)))
        self.encoder = nn.ModuleList([_AttentionName(blocks)])
        merges = range(len(channels) - 1)
        self.lateral_convs = nn.ModuleList(
            ConvNorm(hidden_dim, hidden_dim, 1, activation="silu") for _ in merges
        )
        self.fpn_blocks = nn.ModuleList(CSPLayer(2 * hidden_dim, hidden_dim, expansion) for _ in merges)
        self.downsample_convs = nn.ModuleList(
            ConvNorm(hidden_dim, hidden_dim, 3, 2, activation="silu") for _ in merges
        )
        self.pan_blocks = nn.ModuleList(CSPLayer(2 * hidden_dim, hidden_dim, expansion) for _ in merges)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Levels (batch, channels, h, w), fine to coarse, to as many of (batch, hidden_dim, h, w)."""
        levels = [project(level) for project, level in zip(self.input_proj, features, strict=True)]
        levels[-1] = self.encoder[0](levels[-1])

        # top-down: the coarser level, squeezed, is upsampled and merged into the finer one
        squeezed, merged = [], levels.pop()
        for lateral, merge in zip(self.lateral_convs, self.fpn_blocks, strict=True):
            squeezed.append(lateral(merged))
            raised = F.interpolate(squeezed[-1], scale_factor=2.0, mode="nearest")
            merged = merge(torch.cat([raised, levels.pop()], dim=1))

        # bottom-up: each result is merged into what was squeezed on the way down
        outputs = [merged]
        for shrink, merge in zip(self.downsample_convs, self.pan_blocks, strict=True):
            outputs.append(merge(torch.cat([shrink(outputs[-1]), squeezed.pop()], dim=1)))
        return outputs


class _AttentionName(nn.Module):
    """The ConvNeXt blocks under the release's name `self_attn.stages.0`: they stand where attention was."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.stages = nn.ModuleList([blocks])
        init_convnext(self)

    def forward(self, features: Tensor) -> Tensor:
        return self.self_attn.stages[0](features)  # type: ignore[index,operator]
