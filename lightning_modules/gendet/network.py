"""GenDet's networks: teacher, student, augmenter and classifier, each one transformer block over one feature
vector (section 3 of the paper, arXiv 2312.08880).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.gendet.losses import discrepancy

Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection, in the order q, k, v.

    Args:
        dim: width.
        heads: must divide the width.
        dropout: of the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim: {dim} is not divisible by heads: {heads}.")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, dim // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind()  # (batch, heads, tokens, dim / heads)
        dropout = self.dropout if self.training else 0.0
        if count == 1:
            # the weight is 1; a fused kernel's rounding errors would be gradients of queries and keys, and
            # Adam makes steps of any size of those
            weights = F.dropout(torch.ones_like(values[..., :1]), dropout)  # (batch, heads, 1, 1)
            mixed = weights * values
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, dim))


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: width outside.
        hidden: width inside.
        activation: exact GELU or ReLU.
        dropout: after each layer.
    """

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = ACTIVATIONS[activation]()
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., dim) to the same shape."""
        return self.drop(self.fc2(self.drop(self.activation(self.fc1(tokens)))))


class Block(nn.Module):
    """One transformer block over feature vectors, each a sequence of one token.

    The vectors enter as (batch, 1, dim): a two-dimensional input would be read as one sequence by torch's
    stock layer, and samples would attend to each other. With one token the attention weights are 1, so the
    heads, queries and keys change nothing and get a gradient of zero.

    Args:
        dim: width.
        heads: of the attention.
        mlp_ratio: hidden width of the MLP over `dim`.
        norm_first: pre-norm instead of post-norm.
        activation: of the MLP.
        dropout: of attention weights and both branches.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        norm_first: bool = False,
        activation: Activation = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        """(batch, dim) to (batch, dim); no sample sees another."""
        x = vectors.unsqueeze(1)  # (batch, 1, dim)
        if self.norm_first:
            x = x + self.drop(self.attn(self.norm1(x)))
            x = x + self.mlp(self.norm2(x))
        else:
            x = self.norm1(x + self.drop(self.attn(x)))
            x = self.norm2(x + self.mlp(x))
        return x.squeeze(1)


class Classifier(nn.Module):
    """The last detector: a block and one linear layer over the discrepancy.

    Args:
        block: of the discrepancy's width.
        dim: that width.
    """

    def __init__(self, block: Block, dim: int) -> None:
        super().__init__()
        self.block = block
        self.fc = nn.Linear(dim, 1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits (batch,) of "generated" for discrepancies (batch, dim)."""
        return self.fc(self.block(vectors)).squeeze(-1)


class GenDetNet(nn.Module):
    """All parts of GenDet behind the image encoder.

    Example:
        >>> GenDetNet(in_dim=768)(torch.randn(2, 768)).shape
        torch.Size([2])

    Args:
        in_dim: width of the encoder's features.
        dim: width of the embedding and of every block.
        heads: of every block's attention.
        mlp_ratio: hidden width of every block's MLP over `dim`.
        norm_first: pre-norm blocks instead of post-norm.
        activation: of the MLPs.
        dropout: inside the blocks.

    Raises:
        ValueError: `dim` is not divisible by `heads`.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int = 196,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        norm_first: bool = False,
        activation: Activation = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()

        def block() -> Block:
            return Block(dim, heads, mlp_ratio, norm_first, activation, dropout)

        self.in_dim = in_dim
        self.embed = nn.Linear(in_dim, dim)
        self.teacher = block()
        self.teacher_head = nn.Linear(dim, 1)
        self.student = block()
        self.augmenter = block()
        self.classifier = Classifier(block(), dim)

    def teacher_logits(self, embedded: Tensor) -> Tensor:
        """The teacher's own logits (batch,) for embedded features (batch, dim)."""
        return self.teacher_head(self.teacher(embedded)).squeeze(-1)

    def discrepancy(self, embedded: Tensor) -> Tensor:
        """Elementwise squared difference of teacher and student, (batch, dim) to (batch, dim)."""
        return discrepancy(self.teacher(embedded), self.student(embedded))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch,) of "generated" for features (batch, in_dim); augmenter and teacher head unused."""
        return self.classifier(self.discrepancy(self.embed(features)))
