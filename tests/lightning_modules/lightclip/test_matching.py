"""The batched assignment against scipy's, and what must hold between the readings of matching."""

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from lightning_modules.lightclip.assignment import assign, assign_together
from lightning_modules.lightclip.matching import Matching, assigned_score, token_scores


@pytest.mark.parametrize(
    ("patches", "words", "capacity"), [(49, 16, 1), (9, 7, 2), (4, 11, 2), (5, 9, 1), (49, 30, 1)]
)
@pytest.mark.parametrize("solver", [assign, assign_together])
def test_the_assignment_is_scipys(solver, patches, words, capacity):
    stream = torch.Generator().manual_seed(patches + words)
    score = torch.randn(24, patches, words, generator=stream, dtype=torch.float64)
    lengths = torch.randint(0, words + 1, (24,), generator=stream)
    found = solver(score, lengths, capacity)
    for problem in range(24):
        own, count = score[problem], int(lengths[problem])
        assert (found[problem, count:] == -1).all()
        matched = (found[problem] >= 0).nonzero()[:, 0]
        assert len(matched) == min(count, patches * capacity)
        assert torch.bincount(found[problem, matched], minlength=1).max() <= capacity or not len(matched)
        slots = own[:, :count].repeat_interleave(capacity, 0).numpy()
        best = slots[linear_sum_assignment(slots, maximize=True)].sum()
        assert float(own[found[problem, matched], matched].sum()) == pytest.approx(best, abs=1e-9)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_more_room_never_lowers_a_score():
    cosine = torch.randn(20, 9, 8, generator=torch.Generator().manual_seed(1))
    lengths = torch.full((20,), 8)
    scores = [assigned_score(cosine, lengths, k) for k in (1, 2, 8)]
    assert (scores[1] >= scores[0] - 1e-6).all()
    assert (scores[0] < scores[2]).any()
    torch.testing.assert_close(scores[2], cosine.amax(1).mean(1))


@pytest.mark.parametrize("mode", ["relaxed", "bidirectional", "sinkhorn"])
def test_chunks_and_padding_change_nothing(mode):
    patches, words = unit(5, 6, 8).requires_grad_(), unit(5, 7, 8, seed=1)
    valid = torch.arange(7) < torch.tensor([3, 6, 1, 0, 5])[:, None]
    whole = token_scores(patches, words, valid, Matching(mode))
    parts = token_scores(patches, words, valid, Matching(mode, budget=1))
    torch.testing.assert_close(parts, whole)
    longer = token_scores(patches, torch.cat([words, unit(5, 2, 8)], 1), F.pad(valid, (0, 2)), Matching(mode))
    torch.testing.assert_close(longer, whole)
    gradients = [torch.autograd.grad(sum(s.sum() for s in scores), patches)[0] for scores in (whole, parts)]
    torch.testing.assert_close(*gradients)


def test_positives_only_bind_the_diagonal():
    patches, words = unit(4, 3, 8), unit(4, 3, 8, seed=2)
    valid = torch.ones(4, 3, dtype=torch.bool)
    free = token_scores(patches, words, valid)[0]
    bound = token_scores(patches, words, valid, Matching(capacity=1))[0]
    own = token_scores(patches, words, valid, Matching(capacity=1, pairs="positives"))[0]
    assert not torch.equal(bound, free)
    torch.testing.assert_close(own.diagonal(), bound.diagonal())
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(own[off], free[off])
