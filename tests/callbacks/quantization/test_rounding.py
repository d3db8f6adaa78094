"""Grids and learned rounding: facts that hold for any numbers."""

import pytest
import torch

from callbacks.quantization.activations import ActivationQuantizer, quantize_tensor
from callbacks.quantization.grid import Grid, fit_grid, from_integers, to_integers
from callbacks.quantization.losses import hidden_error
from callbacks.quantization.offsets import SMALLEST_END, LearnedOffset
from callbacks.quantization.rounding import LearnedRounding, rect, rounding_penalty


@pytest.fixture
def weight():
    return torch.randn(12, 64, dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizing_twice_changes_nothing_and_scales_commute(weight, bits, symmetric):
    grid = fit_grid(weight, bits, 16, symmetric)
    integers = to_integers(weight, grid)
    assert torch.equal(to_integers(from_integers(integers, grid), grid), integers)
    larger = fit_grid(4 * weight, bits, 16, symmetric)
    torch.testing.assert_close(larger.scale, 4 * grid.scale)
    assert torch.equal(to_integers(4 * weight, larger), integers)
    assert integers.min() >= grid.low
    assert integers.max() <= grid.high


def test_a_group_of_zeros_stays_zero():
    grid = fit_grid(torch.zeros(2, 8), 4, 4)
    assert torch.equal(from_integers(to_integers(torch.zeros(2, 8), grid), grid), torch.zeros(2, 8))


def test_more_bits_and_smaller_groups_err_less(weight):
    def error(bits, group):
        grid = fit_grid(weight, bits, group)
        return float((from_integers(to_integers(weight, grid), grid) - weight).square().sum())

    assert error(8, 16) < error(4, 16) < error(4, 64) < error(2, 64)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rank", [0, 5, "full"])
def test_untrained_rounding_is_nearest_and_the_soft_weight_is_the_weight(rank, symmetric):
    # multiples of an eighth: many exact ties, which go to the even neighbour
    weight = torch.randint(-16, 17, (12, 64)).float() / 8
    rounding = LearnedRounding(weight, 3, 32, symmetric, rank)
    grid = fit_grid(weight, 3, 32, symmetric)
    integers = to_integers(weight, grid)
    assert torch.equal(rounding.integers().float(), integers)
    torch.testing.assert_close(rounding(), from_integers(integers, grid))
    assert rounding.changed() == 0
    rounding.hard = False
    steps, zero = (value.repeat_interleave(32, 1) for value in (grid.scale, grid.zero_point))
    inside = (weight >= (grid.low - zero) * steps) & (weight <= (grid.high - zero) * steps)
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(rounding()[inside], weight[inside], atol=1e-5, rtol=1e-5)


def plain_weight(rounding, hard):
    """The definition of the spec through autograd: base, clamp, scale."""
    v = rounding.logits()
    repeat = v.shape[1] // rounding.scale.shape[1]
    zero = rounding.zero_point.repeat_interleave(repeat, 1)
    base = rounding.base_of_test + 0.0
    soft = (base + rect(v) + zero).clamp(rounding.low, rounding.high) - zero
    up = (base + (v >= 0) + zero).clamp(rounding.low, rounding.high) - zero
    value = soft + (up - soft).detach() if hard else soft
    return value * rounding.scale.repeat_interleave(repeat, 1)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("rank", [3, "full"])
def test_the_fused_gradient_is_the_one_of_the_definition(weight, rank, hard):
    rounding = LearnedRounding(weight, 2, 16, rank=rank)
    rounding.hard = hard
    grid = fit_grid(weight, 2, 16)
    rounding.base_of_test = (weight / grid.scale.repeat_interleave(16, 1)).floor()
    with torch.no_grad():
        for parameter in rounding.rounding_parameters():
            parameter.add_(torch.randn_like(parameter))
        rounding.scale.mul_(1.3)  # the learned step is no longer the one that the floor was taken with
    direction = torch.randn_like(weight)
    torch.testing.assert_close(rounding(), plain_weight(rounding, hard))
    parameters = [*rounding.rounding_parameters(), rounding.scale]
    fused = torch.autograd.grad((rounding() * direction).sum(), parameters)
    plain = torch.autograd.grad((plain_weight(rounding, False) * direction).sum(), parameters[:-1])
    for found, wanted in zip(fused, plain, strict=False):
        torch.testing.assert_close(found, wanted)
    (steps,) = torch.autograd.grad((plain_weight(rounding, hard) * direction).sum(), [rounding.scale])
    torch.testing.assert_close(fused[-1], steps)


def straight_through(x, value):
    return x + (value - x).detach()


def plain_offset_weight(offset, weight, symmetric):
    """AutoRound's definition through autograd; `where` has a gradient at the bound, `clamp` none."""
    groups = weight.unflatten(1, (-1, 16))
    if symmetric:
        step = groups.abs().amax(2, keepdim=True) * offset.high_end[..., None] / 3
        zero, low, high = torch.zeros_like(step), -4, 3
    else:
        bottom = groups.amin(2, keepdim=True).clamp_max(0) * offset.low_end[..., None]
        step = (groups.amax(2, keepdim=True).clamp_min(0) * offset.high_end[..., None] - bottom) / 7
        zero, low, high = straight_through(-bottom / step, (-bottom / step).round()), 0, 7
    shifted = groups / step + offset.offset.unflatten(1, (-1, 16))
    integers = straight_through(shifted, shifted.round()) + zero
    integers = torch.where(integers < low, low, torch.where(integers > high, high, integers))
    return ((integers - zero) * step).flatten(1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_offsets_and_ends_of_ranges_have_the_gradient_of_the_definition(weight, symmetric):
    offset = LearnedOffset(weight, 3, 16, symmetric)
    assert torch.equal(offset(), from_integers(*_nearest(weight, symmetric))), "untrained it is RTN"
    assert offset.changed() == 0
    direction = torch.randn_like(weight)
    for ends in (1.0, 0.7):  # where they start, which is their bound; and where much is clipped
        with torch.no_grad():
            offset.offset.uniform_(-0.5, 0.5)
            for end in offset.step_parameters():
                end.mul_(ends)
        parameters = [*offset.rounding_parameters(), *offset.step_parameters()]
        fused = torch.autograd.grad((offset() * direction).sum(), parameters)
        plain_weight = plain_offset_weight(offset, weight, symmetric)
        plain = torch.autograd.grad((plain_weight * direction).sum(), parameters)
        torch.testing.assert_close(offset(), plain_weight)
        for found, wanted in zip(fused, plain, strict=True):
            torch.testing.assert_close(found, wanted)
            assert (found != 0).any()
    torch.testing.assert_close(from_integers(offset.integers().double(), offset.grid()), offset())
    assert 0.1 < offset.changed() < 0.9


def _nearest(weight, symmetric):
    grid = fit_grid(weight, 3, 16, symmetric)
    return to_integers(weight, grid), grid


def test_offsets_stay_within_half_a_step_and_ends_within_their_range(weight):
    offset = LearnedOffset(weight, 3, 16)
    with torch.no_grad():
        for parameter in offset.parameters():
            parameter.add_(7 * torch.randn_like(parameter))
    offset.clamp_steps()
    assert offset.offset.abs().max() == 0.5
    assert all((end.amin(), end.amax()) == (SMALLEST_END, 1) for end in offset.step_parameters())


def test_trainable_numbers():
    for rank, count in ((5, 5 * (96 + 64)), ("full", 96 * 64), (0, 0)):
        rounding = LearnedRounding(torch.randn(96, 64), 2, 32, rank=rank)
        assert sum(parameter.numel() for parameter in rounding.rounding_parameters()) == count


def test_changed_counts_the_weights_that_left_their_nearest_neighbour():
    weight = torch.tensor([[0.0, 0.1, 0.4, 0.9, 3.0]])  # steps of 1; the last one has nothing above it
    rounding = LearnedRounding(weight, 2, rank="full")
    with torch.no_grad():
        rounding.full.mul_(-1)
    assert rounding.integers().tolist() == [[1, 1, 1, 0, 3]]
    assert rounding.changed() == pytest.approx(4 / 5)


def test_penalty_is_zero_only_where_decided():
    assert rounding_penalty(torch.tensor([0.0, 1.0]), 2.0).tolist() == [0, 0]
    assert rounding_penalty(torch.tensor([0.5, 0.5]), 7.0).tolist() == [1, 1]
    delta = torch.tensor([0.2])
    assert rounding_penalty(delta, 2.0) < rounding_penalty(delta, 8.0) < 1


def test_learned_step_has_the_gradient_of_lsq():
    x = torch.tensor([0.34, -0.9, 5.0, -7.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    quantize_tensor(x, step, 3).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]
    wanted = (1 - 0.68) + (-2 + 1.8) + 3 - 4
    assert step.grad.item() == pytest.approx(wanted, abs=1e-6)


def test_sixteen_bits_are_the_identity():
    x = torch.randn(3, 5)
    assert ActivationQuantizer(16, "dynamic_token")(x) is x


def test_modes_differ_by_their_zero_point():
    x = torch.rand(2, 7, 12) + 3  # far from zero: a symmetric grid wastes half of its points
    errors = [
        (ActivationQuantizer(4, mode)(x) - x).abs().amax()
        for mode in ("dynamic_token", "dynamic_token_asymmetric")
    ]
    assert errors[0] > 1.5 * errors[1]
    largest = x.amax(-1, keepdim=True)  # the grid reaches from zero to the largest value
    assert errors[1] <= (largest / 15 / 2).amax() * (1 + 1e-5)


def test_loss_facts():
    target, output = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    assert hidden_error(target, target) == 0
    assert hidden_error(target, output) > 0
    shifted = output + torch.randn(2, 6, 1)
    torch.testing.assert_close(
        hidden_error(target, shifted, l2=False), hidden_error(target, output, l2=False)
    )
    mask = torch.ones(2, 6)
    mask[:, 4:] = 0
    output[:, 4:] = 1e6
    torch.testing.assert_close(hidden_error(target, output, mask), hidden_error(target[:, :4], output[:, :4]))


def test_grid_of_integers_is_a_plain_record():
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 0, 3)
    assert from_integers(torch.tensor([[1.0, 2.0]]), grid).tolist() == [[1, 2]]
