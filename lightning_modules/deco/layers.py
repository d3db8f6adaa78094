"""Building blocks that DECO and DECO+ share. Grids and feature maps are (batch, channels, height, width)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

LAYER_NORM_EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channel axis of (batch, channels, height, width)."""

    def forward(self, features: Tensor) -> Tensor:
        """Same shape."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """`x + gamma * W2 GELU(W1 LN(dw(x)))` (DECO's encoder block, section 2.2 of its description).

    Args:
        dim: channels.
        kernel: side of the depthwise convolution, odd.
        layer_scale: initial value of gamma.
    """

    def __init__(self, dim: int, kernel: int = 7, layer_scale: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = depthwise(dim, kernel)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, features: Tensor) -> Tensor:
        """Same shape."""
        hidden = self.norm(self.dwconv(features).permute(0, 2, 3, 1))  # (batch, height, width, dim)
        hidden = scaled(self.gamma, self.pwconv2(F.gelu(self.pwconv1(hidden))))
        return features + hidden.permute(0, 3, 1, 2)


def scaled(gamma: Tensor | None, hidden: Tensor) -> Tensor:
    """Layer scale of (..., dim); None where `deploy` has folded it into the layer before."""
    return hidden if gamma is None else gamma * hidden


def depthwise(dim: int, kernel: int | tuple[int, int]) -> nn.Conv2d:
    """A depthwise convolution with bias that keeps the size; kernel sides are odd."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"kernel: depthwise kernels are odd, not {height}x{width}.")
    padding = (height // 2, width // 2)
    return nn.Conv2d(dim, dim, (height, width), padding=padding, groups=dim)


def init_convnext(module: nn.Module) -> None:
    """Truncated normal (0.02) weights and zero biases of convolutions and linear layers, as ConvNeXt does."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class InceptionDepthwise(nn.Module):
    """DECO+'s self-interaction kernel: [identity | k x k | 1 x width | height x 1] over groups of channels.

    Args:
        dim: channels.
        height: length of the vertical kernel.
        width: length of the horizontal kernel.
        square: side of the small square kernel.
        branch_ratio: share of the channels that each of the three convolutions gets; the rest, the first
            ones, pass unchanged.
    """

    def __init__(
        self, dim: int, height: int = 13, width: int = 15, square: int = 3, branch_ratio: float = 0.25
    ) -> None:
        super().__init__()
        branch = int(dim * branch_ratio)
        if not 0 < 3 * branch <= dim:
            raise ValueError(
                f"branch_ratio: three branches of {branch_ratio} do not fit into {dim} channels."
            )
        self.dwconv_hw = depthwise(branch, square)
        self.dwconv_w = depthwise(branch, (1, width))
        self.dwconv_h = depthwise(branch, (height, 1))
        self.split = (dim - 3 * branch, branch, branch, branch)

    def forward(self, grid: Tensor) -> Tensor:
        """Same shape."""
        same, square, horizontal, vertical = grid.split(self.split, dim=1)
        branches = (same, self.dwconv_hw(square), self.dwconv_w(horizontal), self.dwconv_h(vertical))
        return torch.cat(branches, dim=1)


class InteractionLayer(nn.Module):
    """One layer of DECO's decoder: self-interaction on the query grid, cross-interaction with the memory.

    With T the queries' grid, M the memory, P the queries' positions:

    1. SIM: ``T1 = T + gamma1 * FFN1(LN1(mix(T + P)))`` on the grid;
    2. CIM: ``U = up(T1)``, ``F = LN2(U + dw(fuse(U, M)))`` at the size of the memory;
    3. ``G = F + gamma2 * FFN2(F)``;
    4. ``T' = pool(G)`` back on the grid.

    Args:
        dim: channels d.
        mix: the spatial mixing of the SIM, (batch, d, height, width) to the same.
        kernel: side of the CIM's depthwise kernel, odd.
        fusion: of upsampled queries and memory; `concat` is mixed back to d channels by a 1x1 convolution.
        upsample: how the grid grows to the memory's size.
        pool: how it shrinks back.
        layer_scale: initial value of gamma1 and gamma2.
    """

    def __init__(
        self,
        dim: int,
        mix: nn.Module,
        kernel: int = 9,
        fusion: Literal["add", "mul", "concat"] = "add",
        upsample: Literal["nearest", "bilinear"] = "nearest",
        pool: Literal["max", "avg"] = "max",
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dwconv1 = mix
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.pwconv1_1 = nn.Linear(dim, 4 * dim)
        self.pwconv1_2 = nn.Linear(4 * dim, dim)
        self.gamma1: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale))
        self.dwconv2 = depthwise(dim, kernel)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.pwconv2_1 = nn.Linear(dim, 4 * dim)
        self.pwconv2_2 = nn.Linear(4 * dim, dim)
        self.gamma2: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale))
        self.fusion = fusion
        self.upsample = upsample
        self.pool = pool
        if fusion == "concat":
            self.fuse = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, queries: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """The next layer's queries.

        Args:
            queries: T, (batch, d, qH, qW).
            memory: M, (batch, d, h, w).
            position: P, (batch or 1, d, qH, qW).
        """
        grid = queries.shape[-2:]
        hidden = self.norm1(self.dwconv1(queries + position).permute(0, 2, 3, 1))
        hidden = scaled(self.gamma1, self.pwconv1_2(F.gelu(self.pwconv1_1(hidden))))
        queries = queries + hidden.permute(0, 3, 1, 2)  # (batch, d, qH, qW)

        raised = resize(queries, memory.shape[-2:], self.upsample)  # (batch, d, h, w)
        crossed = raised + self.dwconv2(self._fused(raised, memory))
        crossed = self.norm2(crossed.permute(0, 2, 3, 1))  # (batch, h, w, d)
        crossed = crossed + scaled(self.gamma2, self.pwconv2_2(F.gelu(self.pwconv2_1(crossed))))
        return pool_to_grid(crossed.permute(0, 3, 1, 2), grid, self.pool)

    def _fused(self, raised: Tensor, memory: Tensor) -> Tensor:
        if self.fusion == "add":
            return raised + memory
        if self.fusion == "mul":
            return raised * memory
        return self.fuse(torch.cat([raised, memory], dim=1))


def resize(features: Tensor, size: Sequence[int], mode: Literal["nearest", "bilinear"] = "nearest") -> Tensor:
    """(batch, d, h, w) at exactly `size`; nearest takes source index floor(i * in / out) on each axis."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    if mode == "nearest":
        return F.interpolate(features, size=tuple(size), mode="nearest")
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def pool_to_grid(features: Tensor, grid: Sequence[int], mode: Literal["max", "avg"] = "max") -> Tensor:
    """Adaptive pooling of (batch, d, h, w) to (batch, d, qH, qW).

    Cell a of q on an axis of length n pools [floor(a n / q), ceil((a + 1) n / q)); windows may overlap.
    """
    if mode == "avg":
        return F.adaptive_avg_pool2d(features, (grid[0], grid[1]))
    if torch.compiler.is_compiling():
        return _gathered_max(_gathered_max(features, grid[0], -2), grid[1], -1)
    return F.adaptive_max_pool2d(features, tuple(grid))


def _gathered_max(features: Tensor, cells: int, dim: int) -> Tensor:
    """Adaptive max pooling of one axis (counted from the end) in terms that ONNX has words for."""
    length = features.shape[dim]
    starts = [cell * length // cells for cell in range(cells)]
    ends = [-(-(cell + 1) * length // cells) for cell in range(cells)]
    longest = max(end - start for start, end in zip(starts, ends, strict=True))
    windows = [
        [min(start + step, end - 1) for step in range(longest)]
        for start, end in zip(starts, ends, strict=True)
    ]
    index = torch.tensor(windows, device=features.device).flatten()
    gathered = features.index_select(dim, index).unflatten(dim, (cells, longest))
    return gathered.amax(dim)


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: of input, hidden layers and output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., first width) to (..., last width)."""
        *inner, last = self.layers
        for layer in inner:
            hidden = F.relu(layer(hidden))
        return last(hidden)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation; padding (k - 1) // 2.

    Args:
        channels_in: of the input.
        channels_out: of the output.
        kernel: side k.
        stride: of the convolution.
        activation: after the norm.
        frozen: batch norm with fixed statistics and fixed affine part.
        padding: another padding than (k - 1) // 2.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int = 1,
        activation: Literal["relu", "silu"] | None = None,
        frozen: bool = False,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.norm: nn.Module = (FrozenBatchNorm2d if frozen else nn.BatchNorm2d)(channels_out)
        activations = {None: nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU}
        self.act = activations[activation]()

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels_in, h, w) to (batch, channels_out, h', w')."""
        return self.act(self.norm(self.conv(features)))


def negative_bias(probability: float = 0.01) -> float:
    """Bias of a sigmoid whose output is `probability`: the start of every classification head."""
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
