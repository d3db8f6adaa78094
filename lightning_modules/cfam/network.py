"""What CFAM adds to CLIP for training: the granularity decoder, the matcher, the identity head."""

from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from lightning_modules.parts.options import check


class Blocks(nn.Module):
    """CLIP's residual blocks, seen in both directions, with CLIP's initialisation.

    Args:
        dim: width, a multiple of 64 (the width of a head).
        depth: number of blocks.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        check(dim % 64 == 0, "embed_dim", dim, "a multiple of 64")
        check(depth >= 1, "depth", depth, "at least 1")
        blocks: list[Any] = [
            ResidualAttentionBlock(dim, dim // 64, act_layer=QuickGELU) for _ in range(depth)
        ]
        self.resblocks = nn.ModuleList(blocks)
        for block in blocks:
            initialise_attention(block.attn, dim, depth)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(block.mlp.c_fc.bias)
            nn.init.zeros_(block.mlp.c_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, dim) to the same."""
        for block in self.resblocks:
            x = block(x)
        return x


def initialise_attention(attention: nn.MultiheadAttention, dim: int, depth: int) -> None:
    """CLIP's initialisation: standard deviations dim^-0.5 and dim^-0.5 (2 depth)^-0.5, no bias."""
    nn.init.normal_(attention.in_proj_weight, std=dim**-0.5)
    nn.init.normal_(attention.out_proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)
    nn.init.zeros_(attention.in_proj_bias)
    nn.init.zeros_(attention.out_proj.bias)


class GranularityDecoder(nn.Module):
    """K learnable queries read the tokens of either modality (section 2.3).

    Args:
        dim: width of the joint space, a multiple of 64.
        num_queries: K.
        depth: of the blocks after the cross attention.
    """

    def __init__(self, dim: int, num_queries: int = 16, depth: int = 2) -> None:
        super().__init__()
        check(num_queries >= 1, "num_queries", num_queries, "at least 1")
        self.transformer = Blocks(dim, depth)
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.ln_q, self.ln_kv, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, dim // 64, batch_first=True)
        initialise_attention(self.cross_attn, dim, depth)

    def forward(self, tokens: Tensor, ignore: Tensor | None = None) -> Tensor:
        """(B, L, dim) to (B, K, dim).

        Args:
            tokens: of one modality.
            ignore: bool (B, L), True where a token is padding.
        """
        queries = self.ln_q(self.queries).expand(len(tokens), -1, -1)
        memory = self.ln_kv(tokens)
        read, _ = self.cross_attn(queries, memory, memory, key_padding_mask=ignore, need_weights=False)
        return self.ln_post(self.transformer(read))


class Matcher(nn.Module):
    """Whether an image and a caption belong together, from their query features (section 2.5).

    Args:
        dim: width, a multiple of 64.
        depth: of the blocks.
    """

    def __init__(self, dim: int, depth: int = 2) -> None:
        super().__init__()
        self.transformer = Blocks(dim, depth)
        self.ln_post = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim)
        self.activation = QuickGELU()
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(N, K, dim) of both to logits (N,)."""
        read = self.ln_post(self.transformer(torch.cat([image, text], dim=1))).mean(dim=1)
        return self.fc2(self.activation(self.fc1(read))).squeeze(1)


class IdentityHead(nn.Module):
    """The identity that a pair shares, or the extra class C of pairs that share none (section 2.6).

    Args:
        dim: width of a feature.
        num_classes: C, training identities.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.activation = nn.GELU()
        self.classifier = small_classifier(dim, num_classes + 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Raw features (N, dim) of both to logits (N, C + 1)."""
        return self.classifier(self.activation(self.norm(self.proj(torch.cat([first, second], dim=1)))))


def small_classifier(dim: int, classes: int) -> nn.Linear:
    """A linear layer with weights N(0, 0.001) and no bias at the start."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=0.001)
    nn.init.zeros_(layer.bias)
    return layer
