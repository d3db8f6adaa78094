"""TinyViT with the neck of SAM, by the names of its files."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 16
"""Pixels of the frame for one place of an embedding."""


class ConvBN(nn.Sequential):
    """Convolution without bias and batch norm, called `c` and `bn`."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1):
        super().__init__()
        self.add_module("c", nn.Conv2d(ins, outs, kernel, stride, padding, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outs))


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class MBConv(nn.Module):
    """Inverted bottleneck with a residual."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = channels * expansion
        self.conv1 = ConvBN(channels, hidden, 1)
        self.conv2 = ConvBN(hidden, hidden, 3, 1, 1, groups=hidden)
        self.conv3 = ConvBN(hidden, channels, 1)
        nn.init.zeros_(self.conv3.bn.weight)  # type: ignore[arg-type, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w), same shape."""
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class PatchMerging(nn.Module):
    """Three convolutions from one width to the next, halving the map or not."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(ins, outs, 1)
        self.conv2 = ConvBN(outs, outs, 3, stride, 1, groups=outs)
        self.conv3 = ConvBN(outs, outs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, outs, h / stride, w / stride) of a map."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Attention(nn.Module):
    """Self-attention within windows, with a bias for each absolute offset; the LayerNorm is inside."""

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        offsets = [(axis.flatten()[:, None] - axis.flatten()).abs() for axis in (y, x)]
        self.register_buffer("attention_bias_idxs", offsets[0] * window + offsets[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, tokens, dim), same shape."""
        count, tokens, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(count, tokens, self.heads, 3 * self.head_dim)
        q, k, v = qkv.split(self.head_dim, dim=-1)
        bias = self.attention_biases[:, self.attention_bias_idxs].to(q.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, bias[None].expand(count, -1, -1, -1))
        return self.proj(attended.transpose(1, 2).reshape(count, tokens, dim))


class MLP(nn.Module):
    """LayerNorm and two linear layers."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, dim * ratio), nn.Linear(dim * ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    """Window attention, a local convolution without residual, an MLP."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, heads, window)
        self.mlp = MLP(dim)
        self.local_conv = ConvBN(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """A map (batch, dim, h, w), same shape."""
        batch, dim, height, width = x.shape
        x = x + self._attended(x)
        x = self.local_conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.mlp(tokens)).transpose(1, 2).view(batch, dim, height, width)

    def _attended(self, x: Tensor) -> Tensor:
        """Windows are padded right and below with zeros, before the norm."""
        batch, dim, height, width = x.shape
        side = self.window
        if (height, width) == (side, side):
            return self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)
        padded = F.pad(x, (0, -width % side, 0, -height % side))
        rows, columns = padded.shape[2] // side, padded.shape[3] // side
        windows = padded.view(batch, dim, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        attended = self.attn(windows.reshape(-1, side * side, dim))
        whole = attended.view(batch, rows, columns, side, side, dim).permute(0, 5, 1, 3, 2, 4)
        return whole.reshape(padded.shape)[:, :, :height, :width]


class Stage(nn.Module):
    """Blocks, and what leads to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """A map."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Two strided convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, dim // 2, 3, 2, 1), nn.GELU(), ConvBN(dim // 2, dim, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, h / 4, w / 4) of images."""
        return self.seq(x)


class TinyViT(nn.Module):
    """TinyViT with SAM's neck: images (batch, 3, h, w) to embeddings (batch, 256, h / 16, w / 16).

    Args:
        dims: of the four stages.
        depths: blocks of each.
        heads: of attention; the first stage has none.
        windows: sides of the windows; likewise.
        width: of the embeddings.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (2, 4, 5, 10),
        windows: Sequence[int] = (7, 7, 14, 7),
        width: int = 256,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dims[0])
        stages = []
        for place, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [
                MBConv(dim) if place == 0 else Block(dim, heads[place], windows[place]) for _ in range(depth)
            ]
            merging = None if place == 3 else PatchMerging(dim, dims[place + 1], 1 if place == 2 else 2)
            stages.append(Stage(blocks, merging))
        self.layers = nn.ModuleList(stages)
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], width, 1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width),
        )
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings.

        Raises:
            ValueError: a side is no multiple of 16.
        """
        if images.shape[-1] % STRIDE or images.shape[-2] % STRIDE:
            raise ValueError(f"images are {tuple(images.shape[-2:])}: multiples of {STRIDE} are needed.")
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
