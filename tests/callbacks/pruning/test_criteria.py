import pytest
import torch

from callbacks.pruning.criteria import (
    drop_and_grow,
    global_magnitude_masks,
    keep_largest,
    kth_smallest,
    random_mask,
)


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_kth_smallest_is_the_sorted_one(k):
    torch.manual_seed(0)
    values = [torch.randn(400).abs(), torch.randn(20, 30).abs() * 1e-3]
    everything = torch.cat([value.flatten() for value in values]).sort().values
    assert kth_smallest(values, k) == everything[k - 1].item()


def test_kth_smallest_among_zeros_ties_and_tiny_numbers():
    values = [torch.tensor([0.0, 0.0, 1e-45, 1.0, 1.0, float("inf")])]
    assert [kth_smallest(values, k) for k in range(1, 7)] == values[0].tolist()
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k={k}"):
            kth_smallest(values, k)


def test_keep_largest_breaks_ties_by_position():
    scores = torch.tensor([[1.0, 3.0, 1.0], [1.0, -1.0, 2.0]])
    assert keep_largest(scores, 4).tolist() == [[True, True, True], [False, False, True]]
    assert keep_largest(scores, 0).sum() == 0
    assert keep_largest(scores, 6).sum() == 5  # the negative one is never kept


def test_global_cut_keeps_n_minus_m_plus_one():
    torch.manual_seed(0)
    weights = {"a": torch.randn(30, 20), "b": 0.1 * torch.randn(17, 5)}
    for density in (0.9, 0.31, 0.02):
        masks = global_magnitude_masks(weights, density)
        total = 685
        assert sum(int(mask.sum()) for mask in masks.values()) == total - round((1 - density) * total) + 1
    assert all(mask.all() for mask in global_magnitude_masks(weights, 1.0).values())


def test_global_cut_never_revives_zeros():
    weights = {"a": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0]).view(2, 3)}
    assert global_magnitude_masks(weights, 0.6)["a"].sum() == 2


def test_global_resnet50_counts_are_golden(golden, fill):
    from torchvision.models import resnet50

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in resnet50().named_parameters() if weight.ndim > 1}
    case = golden["global_resnet50"][0]
    assert list(shapes) == golden["erk_resnet50"]["names"]
    weights = {name: fill.values(name, tuple(shape)) for name, shape in shapes.items()}
    assert sum(weight.numel() for weight in weights.values()) == case["N"]
    kept = [int(mask.sum()) for mask in global_magnitude_masks(weights, case["density"]).values()]
    assert kept == case["kept"]
    assert sum(kept) == case["total_kept"]
    threshold = kth_smallest([weight.abs() for weight in weights.values()], case["rank_of_threshold"])
    assert threshold == pytest.approx(case["threshold"], rel=1e-6)


def test_drop_and_grow_keeps_the_count_and_prefers_gradients():
    weight = torch.tensor([0.0, 0.1, 5.0, 3.0, 0.0, 0.2])
    active = torch.tensor([False, True, True, True, False, True])
    gradient = torch.tensor([9.0, 0.1, 0.0, 0.0, 1.0, 2.0])
    mask = drop_and_grow(
        weight, gradient, active, 2
    )  # drops 0.1 and 0.2; 0.2 has the second largest gradient
    assert mask.tolist() == [True, False, True, True, False, True]


def test_drop_keeps_active_zeros_before_inactive_positions():
    weight = torch.tensor([0.0, 0.0, 0.0, 4.0])
    active = torch.tensor([False, False, True, True])
    assert drop_and_grow(weight, torch.zeros(4), active, 0).tolist() == active.tolist()


def test_random_mask_depends_on_its_seed_alone():
    first, again, other = (random_mask((8, 9), 20, seed) for seed in (3, 3, 4))
    assert first.sum() == other.sum() == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
