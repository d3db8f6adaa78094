import itertools
import math

import pytest
import torch

from callbacks.pruning.rank_loss import (
    choose_rank,
    delta_rank,
    effective_rank,
    energies,
    gram,
    rank_loss,
)


def golden_weight(case, fill):
    shape = tuple(case["shape"])
    weight = fill.inputs(case["label"], shape) * case["scale"]
    if case["sparsity"] is not None:
        magnitude = fill.inputs(case["label"] + ".mask", shape).abs()
        cut = magnitude.flatten().sort().values[round(case["sparsity"] * weight.numel()) - 1]
        weight = weight * (magnitude > cut)
    return weight


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (64, 64), (129, 200)])
def test_the_lower_triangle_of_the_gram_matrix_is_whole(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    plain = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    torch.testing.assert_close(gram(matrix).tril(), plain.tril())
    values = torch.linalg.eigvalsh(gram(matrix))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(plain))


@pytest.mark.parametrize("backend", ["gram", "svd"])
def test_rank_loss_is_golden(golden, fill, backend):
    for case in golden["rank_loss"]:
        weight = golden_weight(case, fill)
        assert int((weight != 0).sum()) == case["nonzero"]
        loss, gradient, rank = rank_loss(weight, case["delta"], backend)
        assert rank == case["k"]
        assert loss == pytest.approx(case["loss"], abs=1e-5)
        if case["grad"] == "zero":
            assert not gradient.any()
            continue
        expected = case["grad"]
        flat = gradient.flatten().double()
        tolerance = 1e-4 * float(flat.abs().max())
        assert flat[:8].tolist() == pytest.approx(expected["first8"], abs=tolerance)
        assert flat[expected["idx"]].tolist() == pytest.approx(expected["at_idx"], abs=tolerance)
        assert float(flat.mean()) == pytest.approx(expected["mean"], abs=tolerance)
        assert float(flat.std(correction=0)) == pytest.approx(expected["std"], rel=1e-4)
        assert float(flat.abs().sum()) == pytest.approx(expected["abs_sum"], rel=1e-4)


def test_rank_choice_is_golden(golden):
    for case in golden["rank_select"]:
        spectrum = torch.tensor(case["squared_singular_values"], dtype=torch.float64)
        assert choose_rank(spectrum, case["tolerance"])[0] == case["k"]


def test_gradient_is_that_of_autograd_with_a_constant_truncation():
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    matrix = weight.view(6, 12) / weight.norm()
    left, values, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
    _, gradient, rank = rank_loss(weight, 0.2)
    low_rank = (left[:, :rank] * values[:rank]) @ right[:rank]
    (-(matrix - low_rank).square().sum()).backward()
    torch.testing.assert_close(gradient, weight.grad)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_invariants(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    loss, gradient, rank = rank_loss(weight, 0.2)
    assert -1 <= loss < 0
    assert abs(float((gradient * weight).sum())) < 1e-12
    for scale in (-2.0, 1e-4, 300.0):
        scaled_loss, scaled_gradient, scaled_rank = rank_loss(scale * weight, 0.2)
        assert (scaled_rank, scaled_loss) == (rank, pytest.approx(loss))
        torch.testing.assert_close(scaled_gradient, gradient / scale)
    rotations = [torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for size in shape]
    turned_loss, turned_gradient, _ = rank_loss(rotations[0] @ weight @ rotations[1], 0.2)
    assert turned_loss == pytest.approx(loss)
    torch.testing.assert_close(turned_gradient, rotations[0] @ gradient @ rotations[1])


def test_closed_cases():
    assert rank_loss(torch.eye(4), 0.2)[::2] == (pytest.approx(-0.25), 3)
    spectrum = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    for delta in (0.2, 0.3):
        loss, _, rank = rank_loss(torch.diag(spectrum.sqrt()), delta)
        assert (rank, loss) == (2, pytest.approx(-0.25))
    loss, gradient, rank = rank_loss(torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 9)), 0.3)
    assert rank == 4
    assert loss == pytest.approx(0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-6
    loss, gradient, rank = rank_loss(torch.randn(1, 9), 0.2)
    assert (loss, rank) == (pytest.approx(-1), 0)
    assert not gradient.any()
    loss, gradient, rank = rank_loss(torch.zeros(3, 4), 0.2)
    assert (loss, rank) == (0, None)
    assert not gradient.any()


def test_ranks_for_reports():
    flat = energies(torch.eye(8))
    assert (delta_rank(flat), effective_rank(flat)) == (8, pytest.approx(8))
    assert delta_rank(flat, 0.3) == 6
    line = energies(torch.ones(3, 7))
    assert (delta_rank(line), effective_rank(line)) == (1, pytest.approx(1))
    nothing = energies(torch.zeros(3, 7))
    assert (delta_rank(nothing), effective_rank(nothing)) == (0, 0)
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert effective_rank(energies(torch.diag(shares.sqrt()))) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("shape", [(24, 24), (16, 72)])
def test_ascent_raises_the_rank_and_never_shrinks_the_norm(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape[0], 2) @ torch.randn(2, shape[1]) / math.sqrt(shape[1])
    weight += 0.02 * torch.randn(shape)
    start = energies(weight)
    norms = [float(weight.norm())]
    for _ in range(60):
        weight -= rank_loss(weight, 0.2)[1]
        norms.append(float(weight.norm()))
    end = energies(weight)
    assert effective_rank(end) >= 3 * effective_rank(start)
    assert delta_rank(end) > 2 * delta_rank(start)
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in itertools.pairwise(norms))
