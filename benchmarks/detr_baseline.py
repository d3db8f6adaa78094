"""A DETR (Carion et al., ECCV 2020) to compare the small DECO with: attention where DECO convolves, and
everything else the same (backbone, width, queries, number of decoder layers, heads, matcher, losses, data).

For `DecoDetector`, as `class_path: detr_baseline.Detr` with this folder on the Python path.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.deco.backbones import BackboneName, build_backbone
from lightning_modules.deco.layers import MLP, negative_bias
from lightning_modules.deco.network import Deco, DetectionNetwork, outputs_of


class Detr(DetectionNetwork):
    """Backbone, transformer encoder over all positions, transformer decoder over learned queries.

    Changed in its favour: norms stand before the attention and feed-forward parts, for short trainings,
    and positions are also added to the features themselves. The small backbone, unlike a ResNet-50, sees too
    little of the borders to know where it is, and values without positions cannot say where an object is.
    No dropout, as DECO has none.

    Args:
        num_classes: width of the logits.
        backbone: as of `Deco`.
        num_queries: boxes an image.
        hidden_dim: width d.
        encoder_layers: transformer layers over the image.
        decoder_layers: transformer layers over the queries.
        heads: of the attention; must divide `hidden_dim`.
    """

    mean = Deco.mean
    std = Deco.std

    def __init__(
        self,
        num_classes: int = 91,
        backbone: BackboneName = "small",
        num_queries: int = 25,
        hidden_dim: int = 96,
        encoder_layers: int = 2,
        decoder_layers: int = 3,
        heads: int = 8,
    ) -> None:
        super().__init__()
        if hidden_dim % heads or hidden_dim % 4:
            raise ValueError(f"hidden_dim: {hidden_dim} is no multiple of 4 and of {heads} heads.")
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.backbone = build_backbone(backbone)
        self.input_proj = nn.Conv2d(self.backbone.channels, hidden_dim, 1)
        self.encoder = nn.ModuleList(EncoderLayer(hidden_dim, heads) for _ in range(encoder_layers))
        self.memory_norm = nn.LayerNorm(hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.decoder = nn.ModuleList(DecoderLayer(hidden_dim, heads) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.class_embed = nn.ModuleList(nn.Linear(hidden_dim, num_classes) for _ in range(decoder_layers))
        self.bbox_embed = nn.ModuleList(
            MLP(hidden_dim, hidden_dim, hidden_dim, 4) for _ in range(decoder_layers)
        )
        self._initialise_heads()

    @torch.no_grad()
    def _initialise_heads(self) -> None:
        """As DECO's: rare classes, one small box in the middle."""
        for classify, box in zip(self.class_embed, self.bbox_embed, strict=True):
            nn.init.constant_(classify.bias, negative_bias())
            nn.init.zeros_(box.layers[-1].weight)
            box.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, -2.0, -2.0]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `DetectionNetwork`; images (batch, 3, H, W)."""
        features = self.input_proj(self.backbone(images))
        place = sine_position(features.shape[-2], features.shape[-1], features)  # (1, h w, d)
        memory = features.flatten(2).transpose(1, 2) + place  # (batch, h w, d)
        for layer in self.encoder:
            memory = layer(memory, place)
        memory = self.memory_norm(memory)

        position = self.query_embed.weight[None]  # (1, queries, d)
        queries = torch.zeros_like(position).expand(len(images), -1, -1)
        hidden = []
        for layer in self.decoder:
            queries = layer(queries, position, memory, place)
            hidden.append(queries)
        if not (self.training or self.all_layers):
            hidden = hidden[-1:]
        normed = [self.norm(queries) for queries in hidden]
        heads = zip(normed, self.class_embed[-len(normed) :], self.bbox_embed[-len(normed) :], strict=True)
        outputs = [(classify(queries), box(queries).sigmoid()) for queries, classify, box in heads]
        return outputs_of([logits for logits, _ in outputs], [boxes for _, boxes in outputs])


class Attention(nn.Module):
    """Multi-head attention with positions on queries and keys, not on values.

    Args:
        dim: width d.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(batch, n, d) looks at (batch, m, d) and (batch, m, d); gives (batch, n, d)."""
        parts = (self.query(queries), self.key(keys), self.value(values))
        split = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


def feed_forward(dim: int) -> nn.Sequential:
    """Four times as wide in between, as DECO's; ReLU as DETR's."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))


class EncoderLayer(nn.Module):
    """Self-attention over the image, then a feed-forward part."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = feed_forward(dim)

    def forward(self, memory: Tensor, place: Tensor) -> Tensor:
        """(batch, h w, d) and positions (1, h w, d)."""
        hidden = self.norm1(memory)
        memory = memory + self.attention(hidden + place, hidden + place, hidden)
        return memory + self.mlp(self.norm2(memory))


class DecoderLayer(nn.Module):
    """Self-attention over the queries, attention to the image, then a feed-forward part."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, heads)
        self.cross_attention = Attention(dim, heads)
        self.mlp = feed_forward(dim)

    def forward(self, queries: Tensor, position: Tensor, memory: Tensor, place: Tensor) -> Tensor:
        """Queries (batch, Q, d) and their positions, memory (batch, h w, d) and its positions."""
        hidden = self.norm1(queries)
        queries = queries + self.self_attention(hidden + position, hidden + position, hidden)
        hidden = self.norm2(queries) + position
        queries = queries + self.cross_attention(hidden, memory + place, memory)
        return queries + self.mlp(self.norm3(queries))


def sine_position(height: int, width: int, like: Tensor, temperature: float = 10_000.0) -> Tensor:
    """DETR's fixed encoding of rows and columns.

    Args:
        height: of the map.
        width: of the map.
        like: (batch, d, h, w); gives width, type and device.
        temperature: the longest wave.

    Returns:
        (1, h w, d), row by row.
    """
    half = like.shape[1] // 2
    waves = temperature ** (torch.arange(0, half, 2, device=like.device) / half)  # (d / 4,)

    def encode(count: int) -> Tensor:
        angles = torch.arange(1, count + 1, device=like.device)[:, None] / count * 2 * math.pi / waves
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, d / 2)

    rows = encode(height)[:, None].expand(-1, width, -1)
    columns = encode(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[None].to(like.dtype)
