"""Retrieval measured without the whole similarity: recall, precision, and the similarity distribution (mSD).

CFAM's section 4.3 defines them. Each value is exact; queries are taken in chunks.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.parts.distributed import first_of_each

CHUNK_BYTES = 128 * 2**20
"""Memory that a chunk of queries may take; the largest tensor of it is a quarter."""
MOST_COUNTED = 24
"""Relevant images of a query up to which counting what ranks above each is faster than sorting all."""


class RetrievalMetrics(Metric):
    """R@k, mAP, mINP and mSD, percent, of queries that rank a gallery by cosine; the same identity is a hit.

    Every image stands in the gallery once and every query counts once, whatever a distributed sampler
    repeats: `index` tells. Ranks may have unequally many.

    Args:
        top: the k of R@k; a smaller gallery is taken whole.
        normalize: map cosines to [0, 1] before mSD, as the authors do.
        released: also give `mSD_released`, what the authors' script computes: it multiplies ranked relevance
            with similarities in the gallery's own order, so it depends on that order.
        ignore_unmatched: drop queries without a relevant image instead of refusing them.
        chunk_bytes: memory of a chunk of queries.
    """

    full_state_update = False
    gallery_features: list[Tensor]
    queries_features: list[Tensor]

    def __init__(
        self,
        top: tuple[int, ...] = (1, 5, 10),
        normalize: bool = True,
        released: bool = False,
        ignore_unmatched: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.top = top
        self.normalize = normalize
        self.released = released
        self.ignore_unmatched = ignore_unmatched
        self.chunk_bytes = chunk_bytes
        for side in ("gallery", "queries"):
            for column in ("features", "identity", "index"):
                self.add_state(f"{side}_{column}", default=[], dist_reduce_fx="cat")

    def update(
        self, side: Literal["gallery", "queries"], features: Tensor, identity: Tensor, index: Tensor
    ) -> None:
        """Collect a batch.

        Args:
            side: what it is of.
            features: (B, D), unit length.
            identity: (B,).
            index: (B,) position in the gallery or among the queries.
        """
        for column, value in (("features", features), ("identity", identity), ("index", index)):
            getattr(self, f"{side}_{column}").append(value.detach())

    @property
    def ready(self) -> bool:
        """Whether this rank has seen images and queries."""
        return bool(len(self.gallery_features) and len(self.queries_features))

    def _side(self, side: str) -> tuple[Tensor, Tensor]:
        columns = [getattr(self, f"{side}_{column}") for column in ("features", "identity", "index")]
        features, identity, index = (c if isinstance(c, Tensor) else torch.cat(c) for c in columns)
        rows = first_of_each(index)
        return features[rows], identity[rows]

    def compute(self) -> dict[str, Tensor]:
        """`R1`, ..., `mAP`, `mINP`, `mSD`, percent, and `mSD_released` where that is asked for.

        Raises:
            ValueError: queries have no relevant image; names the first identity and the count.
        """
        scores = ranking_scores(
            *self._side("queries"),
            *self._side("gallery"),
            normalize=self.normalize,
            released=self.released,
            ignore_unmatched=self.ignore_unmatched,
            chunk_bytes=self.chunk_bytes,
        )
        return summary(scores, self.top)


def summary(scores: dict[str, Tensor], top: tuple[int, ...] = (1, 5, 10)) -> dict[str, Tensor]:
    """Means over the queries, percent."""
    found = {f"R{k}": (scores["first"] <= k).double().mean() for k in top}
    for name, key in (("mAP", "AP"), ("mINP", "INP"), ("mSD", "SD"), ("mSD_released", "SD_released")):
        if key in scores:
            found[name] = scores[key].mean()
    return {name: 100 * value for name, value in found.items()}


@torch.no_grad()
def ranking_scores(
    queries: Tensor,
    query_identity: Tensor,
    gallery: Tensor,
    gallery_identity: Tensor,
    *,
    normalize: bool = True,
    released: bool = False,
    ignore_unmatched: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Tensor]:
    """Scores of every query in [0, 1], in float64, and `first`, the rank of its first relevant image.

    Args:
        queries: (Q, D) unit vectors.
        query_identity: (Q,).
        gallery: (G, D) unit vectors.
        gallery_identity: (G,).
        normalize: see `RetrievalMetrics`.
        released: also `SD_released`.
        ignore_unmatched: see `RetrievalMetrics`.
        chunk_bytes: see `RetrievalMetrics`.

    Returns:
        `first`, `AP`, `INP`, `SD`, and `SD_released`, each (Q,) or fewer where some are dropped.

    Raises:
        ValueError: queries have no relevant image.
    """
    order = torch.argsort(gallery_identity, stable=True)
    known = gallery_identity[order]
    start = torch.searchsorted(known, query_identity)
    count = torch.searchsorted(known, query_identity, right=True) - start
    lone = count == 0
    if lone.any():
        if not ignore_unmatched:
            raise ValueError(
                f"{int(lone.sum())} queries have no image of their identity in the gallery, the first of "
                f"identity {query_identity[lone][0].item()}."
            )
        queries, start, count = queries[~lone], start[~lone], count[~lone]
    parts = []
    rows = max(1, chunk_bytes // (32 * max(1, len(gallery))))
    for part in _chunks(len(queries), rows):
        similarity = queries[part] @ gallery.T
        relevant, valid = _relevant(order, start[part], count[part])
        parts.append(_of_chunk(similarity, relevant, valid, normalize, released))
    names = parts[0] if parts else ()
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def _chunks(length: int, rows: int) -> Iterator[slice]:
    for begin in range(0, length, rows):
        yield slice(begin, min(begin + rows, length))


def _relevant(order: Tensor, start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the gallery (q, n) of every query's relevant images, and which of the n there are."""
    places = torch.arange(int(count.max()), device=order.device)
    valid = places < count[:, None]
    return order[(start[:, None] + places).clamp(max=len(order) - 1)], valid


def _of_chunk(
    similarity: Tensor, relevant: Tensor, valid: Tensor, normalize: bool, released: bool
) -> dict[str, Tensor]:
    """Scores of some queries from their similarities (q, G)."""
    value = similarity.gather(1, relevant)
    ranked = _counted if relevant.shape[1] <= MOST_COUNTED else _sorted
    rank, above = ranked(similarity, relevant, value)
    rank = rank.masked_fill(~valid, torch.iinfo(rank.dtype).max)
    rank, by_rank = rank.sort(dim=1)  # the relevant images in ranked order
    valid = valid.gather(1, by_rank)
    value, above = value.double().gather(1, by_rank), above.gather(1, by_rank)
    total = similarity.sum(dim=1, dtype=torch.float64)
    if normalize:  # (s + 1) / 2, also of sums
        value = (value + 1) / 2
        above = (above + rank.where(valid, 0)) / 2
        total = (total + similarity.shape[1]) / 2
    number = valid.sum(dim=1)
    hits = torch.arange(1, rank.shape[1] + 1, device=rank.device)
    scores = {
        "first": rank[:, 0],
        "AP": torch.where(valid, hits.double() / rank, 0.0).sum(dim=1) / number,
        "INP": number.double() / rank.gather(1, number[:, None] - 1).squeeze(1),
        "SD": _distribution(value, above, total, valid, similarity.shape[1]),
    }
    if released:
        scores["SD_released"] = _released(similarity, rank, valid, normalize)
    return scores


def _distribution(value: Tensor, above: Tensor, total: Tensor, valid: Tensor, gallery: int) -> Tensor:
    """SD of queries: `value` and `above` (q, n) are similarity and running sum at each relevant rank."""
    value = value.where(valid, 0.0)
    number = valid.sum(dim=1)
    share = torch.where(valid & (above != 0), value.cumsum(dim=1) / above.where(above != 0, 1.0), 0.0)
    precision = share.sum(dim=1) / number
    inside = value.sum(dim=1)
    others = gallery - number
    mean = (total - inside) / others.clamp(min=1)
    none = (others == 0) | (mean == 0)
    ratio = inside / number / mean.where(~none, 1.0)
    return torch.where(none, 1.0, 1 - torch.exp(-ratio)) * precision


def _counted(similarity: Tensor, relevant: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Rank (q, n) of the relevant images, ties by place, and the sum of the similarities down to each."""
    ranks, sums = [], []
    for slot in range(relevant.shape[1]):
        limit, place = value[:, slot, None], relevant[:, slot]
        before = similarity >= limit
        rank = before.sum(dim=1)
        total = (similarity * before).sum(dim=1, dtype=torch.float64)
        tied = ((similarity == limit).sum(dim=1) > 1).nonzero().squeeze(1)
        if len(tied):
            places = torch.arange(similarity.shape[1], device=similarity.device)
            later = (similarity[tied] == limit[tied]) & (places > place[tied, None])
            rank[tied] -= later.sum(dim=1)
            total[tied] -= later.sum(dim=1) * limit[tied, 0].double()
        ranks.append(rank)
        sums.append(total)
    return torch.stack(ranks, dim=1), torch.stack(sums, dim=1)


def _sorted(similarity: Tensor, relevant: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The same by sorting, for queries with many relevant images."""
    values, order = similarity.sort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order))
    rank = rank.gather(1, relevant)
    return rank, values.cumsum(dim=1, dtype=torch.float64).gather(1, rank - 1)


def _released(similarity: Tensor, rank: Tensor, valid: Tensor, normalize: bool) -> Tensor:
    """What the authors' script gives: ranked relevance on similarities in the gallery's own order."""
    own = similarity.double()
    own = (own + 1) / 2 if normalize else own
    places = (rank - 1).where(valid, 0)
    sums = own.cumsum(dim=1).gather(1, places)
    return _distribution(own.gather(1, places), sums, own.sum(dim=1), valid, own.shape[1])
