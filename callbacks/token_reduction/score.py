"""How much the class token looks at each patch token, and how unevenly (PPT, arXiv 2310.01812, sections 3.2
and 3.3).
"""

from typing import Literal

import torch
from torch import Tensor

Score = Literal["cls_attn_vnorm", "cls_attn"]
ThresholdMode = Literal["variance", "cv2"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type that scores and similarities are computed in: half precisions are too coarse to rank
    tokens.
    """
    return torch.promote_types(dtype, torch.float32)


def class_attention(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention of the class token on every token, summed over the heads.

    Only this one row of the attention matrix is computed, so the attention of the block itself may stay
    fused.

    Args:
        queries: (batch, heads, tokens, head_dim), the class token at position 0.
        keys: (batch, heads, tokens, head_dim), as used in the attention (after a key norm).
        scale: factor of the logits, usually head_dim ** -0.5.
        bias: (batch, 1, 1, tokens) added to the logits: the log of the token sizes.

    Returns:
        (batch, tokens), non-negative, sums to the number of heads.
    """
    query = queries[:, :, :1].to(at_least_float32(queries.dtype)) * scale  # (batch, heads, 1, head_dim)
    # a product and a sum: a matrix product with one row would first copy the keys, which lie apart
    logits = (keys * query).sum(dim=-1)  # (batch, heads, tokens)
    if bias is not None:
        logits = logits + bias.squeeze(2)
    return logits.softmax(dim=-1).sum(dim=1)


def significance(attention: Tensor, values: Tensor | None, prefix: int) -> Tensor:
    """Significance scores S of the patch tokens: class attention times value norm, scaled to sum to 1.

    Args:
        attention: (batch, tokens), see `class_attention`.
        values: (batch, heads, tokens, head_dim); None leaves the value norm out.
        prefix: leading tokens (class, distillation, registers) that have no score.

    Returns:
        (batch, tokens - prefix).
    """
    raw = attention[:, prefix:]
    if values is not None:
        dtype = at_least_float32(values.dtype)
        # over the heads concatenated, as if the values were (batch, tokens, heads * head_dim)
        raw = raw * torch.linalg.vector_norm(values[:, :, prefix:], dim=(1, 3), dtype=dtype)
    return raw / raw.sum(dim=-1, keepdim=True)


def dispersion(scores: Tensor, mode: ThresholdMode = "variance") -> Tensor:
    """How peaked the scores of an image are: what PPT compares with its threshold.

    Args:
        scores: (batch, patches), each row sums to 1.
        mode: `variance` is the paper's unbiased variance, which shrinks as patches ** -2; `cv2` multiplies
            it by patches ** 2 (the squared coefficient of variation), which does not depend on the number of
            patches.

    Returns:
        (batch,).
    """
    variance = scores.var(dim=-1)
    return variance * scores.shape[-1] ** 2 if mode == "cv2" else variance
