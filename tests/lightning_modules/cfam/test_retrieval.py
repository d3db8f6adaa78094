"""Retrieval metrics: what changes nothing, what must, both ways to rank, and chunks."""

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.parts import retrieval
from lightning_modules.parts.retrieval import RetrievalMetrics, ranking_scores, summary


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(40, 8, generator=generator, dtype=torch.float64), dim=1)
    ids = torch.arange(40) % 9
    gallery[20] = gallery[3]  # equal similarities, other identities
    queries = F.normalize(gallery[:18] + 0.3 * torch.randn(18, 8, generator=generator), dim=1)
    return queries, ids[:18], gallery, ids


def naive(queries, query_ids, gallery, ids):
    """The definitions of section 4.3, query by query."""
    found = []
    for query, identity in zip(queries, query_ids, strict=True):
        similarity = gallery @ query
        order = similarity.argsort(descending=True, stable=True)
        m, s = (ids[order] == identity).double(), (similarity[order] + 1) / 2
        ranks = torch.arange(1, len(m) + 1)
        n = m.sum()
        ap = (m * m.cumsum(0) / ranks).sum() / n
        asp = (m * (m * s).cumsum(0) / s.cumsum(0)).sum() / n
        ratio = s[m == 1].mean() / s[m == 0].mean()
        found.append((ap, n / ranks[m == 1].max(), (1 - torch.exp(-ratio)) * asp))
    return torch.tensor(found).T


@pytest.mark.parametrize("most", [0, 24])
def test_equals_the_definitions_by_counting_and_by_sorting(case, most, monkeypatch):
    monkeypatch.setattr(retrieval, "MOST_COUNTED", most)
    scores = ranking_scores(*case)
    found = torch.stack([scores[name] for name in ("AP", "INP", "SD")])
    torch.testing.assert_close(found, naive(*case), rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(case):
    whole, chunked = ranking_scores(*case), ranking_scores(*case, chunk_bytes=1)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value)


def test_only_the_released_value_depends_on_the_order_of_the_gallery(case):
    queries, query_ids, gallery, ids = case
    gallery = gallery + 1e-3 * torch.arange(40)[:, None] / 40  # no ties, which the order decides
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    first = summary(ranking_scores(queries, query_ids, gallery, ids, released=True))
    second = summary(ranking_scores(queries, query_ids, gallery[order], ids[order], released=True))
    assert first.pop("mSD_released") != second.pop("mSD_released")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)


def test_a_repeated_row_counts_once_and_a_small_gallery_has_an_r10(case):
    queries, query_ids, gallery, ids = (tensor[:9] for tensor in case)
    metrics = RetrievalMetrics()
    for rows in (torch.arange(9), torch.tensor([4, 0])):
        metrics.update("gallery", gallery[rows], ids[rows], rows)
        metrics.update("queries", queries[rows], query_ids[rows], rows)
    expected = summary(ranking_scores(queries, query_ids, gallery, ids))
    for name, value in metrics.compute().items():
        torch.testing.assert_close(value, expected[name])
    assert expected["R10"] == 100


def test_a_query_without_image_is_refused_or_dropped(case):
    queries, query_ids, gallery, ids = case
    query_ids = query_ids.clone()
    query_ids[:2] = 77
    with pytest.raises(ValueError, match=r"2 queries have no image .* identity 77"):
        ranking_scores(queries, query_ids, gallery, ids)
    assert len(ranking_scores(queries, query_ids, gallery, ids, ignore_unmatched=True)["AP"]) == 16


def test_all_relevant_is_perfect(case):
    queries, _, gallery, _ = case
    found = summary(ranking_scores(queries, torch.zeros(18, dtype=int), gallery, torch.zeros(40, dtype=int)))
    for value in found.values():
        torch.testing.assert_close(value, torch.tensor(100.0, dtype=torch.float64))
