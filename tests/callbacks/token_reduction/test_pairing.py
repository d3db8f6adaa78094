import pytest
import torch

from callbacks.token_reduction.pairing import Plan, choose, pair_tokens, prune, removable


@pytest.mark.parametrize(
    ("tokens", "prefix", "r", "expected"), [(197, 1, 50, 50), (97, 1, 50, 48), (98, 2, 50, 48)]
)
def test_at_most_half_of_the_patches_go(tokens, prefix, r, expected):
    assert removable(tokens, prefix, r) == expected


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
def test_prefix_tokens_take_no_part(prefix):
    metric = torch.randn(4, 17, 8)
    metric[:, :prefix] = metric[:, 7:8]  # the best partners there could be
    r = removable(17, prefix, 99)
    plan = pair_tokens(metric, r, prefix)
    assert plan.kept.shape == (4, 17 - r)
    assert (plan.kept[:, :prefix] == torch.arange(prefix)).all()
    assert (plan.into >= prefix).all()
    everything = torch.cat([plan.kept, plan.merged], dim=1).sort(dim=1).values
    assert (everything == torch.arange(17)).all()


def test_output_order_is_prefix_evens_odds():
    kept = pair_tokens(torch.randn(1, 12, 4), 2, prefix=2).kept[0].tolist()
    evens = [position for position in kept[2:] if position % 2 == 0]
    assert kept == [0, 1, *sorted(evens), 3, 5, 7, 9, 11]


def test_identical_tokens_merge_before_all_others():
    metric = torch.randn(1, 17, 8)
    metric[0, 4] = 3 * metric[0, 9]  # only the direction counts
    plan = pair_tokens(metric, 1, prefix=1)
    assert plan.merged.tolist() == [[4]]
    assert plan.kept[0, plan.into[0, 0]].item() == 9


def test_ties_go_to_the_first_token():
    plan = pair_tokens(torch.ones(1, 9, 4), 2, prefix=1)
    assert plan.merged.tolist() == [[2, 4]]
    assert plan.kept[0, plan.into[0]].tolist() == [1, 1]
    assert prune(torch.ones(1, 6), 3, prefix=1).tolist() == [[0, 1, 2, 3]]


def test_zero_keys_do_not_poison_the_match():
    metric = torch.randn(1, 9, 4)
    metric[0, 3] = 0
    assert pair_tokens(metric, 2, prefix=1).kept.max() < 9


def test_choose_goes_image_by_image():
    pruning = prune(torch.rand(3, 8), 5, prefix=1)
    pooling = pair_tokens(torch.randn(3, 9, 4), 3, prefix=1)
    plan = choose(torch.tensor([True, False, True]), pruning, pooling)
    assert isinstance(plan, Plan)
    assert plan.kept[0].equal(pooling.kept[0])
    assert plan.kept[1].equal(pruning[1])
    assert plan.weight.flatten().tolist() == [True, False, True]
