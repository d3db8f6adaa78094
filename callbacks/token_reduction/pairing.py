"""Which tokens a block keeps, and which it merges into which: index arithmetic only, the features are not
touched.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """One block's compression of a batch, as positions; every image keeps the same number of tokens.

    Attributes:
        kept: (batch, kept tokens) input position of each output token.
        merged: (batch, r) input positions of the tokens that enter another one; None where all are dropped.
        into: (batch, r) output position that each of them enters.
        weight: (batch, 1) 1 where the image pools, 0 where `merged` are dropped instead; None for 1
            everywhere.
    """

    kept: Tensor
    merged: Tensor | None = None
    into: Tensor | None = None
    weight: Tensor | None = None


def removable(tokens: int, prefix: int, r: int) -> int:
    """Tokens that a block can remove when asked for `r`: at most half of the patch tokens (spec 2.5)."""
    return min(r, (tokens - prefix) // 2)


def prune(scores: Tensor, keep: int, prefix: int) -> Tensor:
    """Positions to keep: the prefix, then the patches of the highest scores in descending order (ties: the
    first).

    Args:
        scores: (batch, patches).
        keep: patches to keep.
        prefix: leading tokens that are always kept.

    Returns:
        (batch, prefix + keep) positions among prefix + patches tokens.
    """
    order = _descending(scores)[:, :keep] + prefix
    return torch.cat([_positions(0, prefix, 1, order), order], dim=1)


def pair_tokens(metric: Tensor, r: int, prefix: int) -> Plan:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): the r most similar pairs are to be merged.

    The patch tokens at even positions each choose the most similar patch token at an odd position (cosine,
    the first on a tie); the r of them with the closest partners merge into these. Prefix tokens take no part.
    Output order: prefix, even tokens that stay, odd tokens, each in input order.

    Args:
        metric: (batch, tokens, metric_dim) what tokens are compared by: the keys averaged over the heads.
        r: tokens to merge, at most half of the patch tokens.
        prefix: leading tokens that are protected.

    Returns:
        plan with tokens - r kept.
    """
    tokens = metric.shape[1]
    first_even, first_odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    metric = F.normalize(metric, dim=-1)
    evens, odds = metric[:, first_even::2], metric[:, first_odd::2]
    similarity, partner = (evens @ odds.transpose(-1, -2)).max(dim=-1)  # (batch, evens)
    order = _descending(similarity)
    source, staying = order[:, :r], order[:, r:].sort(dim=-1).values
    kept = torch.cat(
        [
            _positions(0, prefix, 1, order),
            first_even + 2 * staying,
            _positions(first_odd, tokens, 2, order),
        ],
        dim=1,
    )
    into = partner.gather(1, source) + (prefix + staying.shape[1])
    return Plan(kept, first_even + 2 * source, into)


def choose(pooled: Tensor, pruning: Tensor, pooling: Plan) -> Plan:
    """Pool the images marked, prune the others, without looking at the marks on the host.

    Both ways keep the same number of tokens, so a batch stays rectangular, and an image that prunes only
    differs in `kept` and in the weight 0 of what would have been merged.

    Args:
        pooled: (batch,) bool.
        pruning: (batch, kept) of `prune`.
        pooling: plan of `pair_tokens`.
    """
    mark = pooled.unsqueeze(1)
    return Plan(torch.where(mark, pooling.kept, pruning), pooling.merged, pooling.into, mark)


def _positions(start: int, stop: int, step: int, like: Tensor) -> Tensor:
    """start, start + step, ... below stop, once for each image of `like` (batch, anything)."""
    return torch.arange(start, stop, step, dtype=torch.int64, device=like.device).expand(like.shape[0], -1)


def _descending(values: Tensor) -> Tensor:
    """Indices that sort the rows of `values` (batch, entries) from high to low, equal ones in input order."""
    if getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():
        return values.sort(
            dim=-1, descending=True
        ).indices  # ONNX knows no other sort, and its TopK is stable
    return values.sort(dim=-1, descending=True, stable=True).indices
