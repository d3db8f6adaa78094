import pytest
import torch

from callbacks.pruning.rank_loss import Truncation, exact_truncation, rank_loss, split
from callbacks.pruning.subspace import decompose, refined_truncation, symmetric_gram


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (64, 64)])
def test_symmetric_gram_is_the_plain_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    plain = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    torch.testing.assert_close(symmetric_gram(matrix), plain)


def gradient_error(truncation: Truncation, weight: torch.Tensor, tolerance: float) -> float:
    exact = rank_loss(weight.double(), tolerance)[1]
    found = truncation.add_gradient(weight, torch.zeros_like(weight))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("tolerance", [0.2, 0.7])  # the basis spans the dropped side, the kept side
@pytest.mark.parametrize("max_error", [1e-4, 0.0])  # the step near the cut is enough, or is not
def test_the_newton_step_squares_the_error_of_spoilt_eigenvectors(tolerance, max_error):
    torch.manual_seed(0)
    weight = torch.randn(256, 600)
    product, eigenvalues, eigenvectors = (part.float() for part in decompose(weight.double()))
    exact = exact_truncation(weight, tolerance)
    # mix pairs near the cut by about 0.01 rad
    cut = 256 - exact.rank
    turn = torch.zeros(256, 256)
    turn[cut - 10 : cut, cut : cut + 10] = 3e-3 * torch.randn(10, 10)
    spoilt = eigenvectors @ torch.linalg.matrix_exp(turn - turn.T)
    basis, _, side = split(spoilt, exact.rank)
    assert side == ("dropped" if tolerance == 0.2 else "kept")
    plain = Truncation(exact.rank, exact.tail, exact.squared_norm, basis, side)
    refined = refined_truncation(product, eigenvalues, spoilt, tolerance, max_error)
    errors = [gradient_error(truncation, weight, tolerance) for truncation in (plain, refined)]
    assert errors[0] > 1e-3
    assert errors[1] < 4 * errors[0] ** 2 + 1e-5
    assert errors[1] < refined.error
    assert (refined.rank, refined.side) == (exact.rank, side)
    assert refined.tail == pytest.approx(exact.tail, abs=1e-6)


def test_equal_eigenvalues_at_the_cut_cannot_be_decided():
    weight = torch.linalg.qr(torch.randn(200, 200))[0]
    assert refined_truncation(*decompose(weight), tolerance=0.2, max_error=1e-4).error > 1e-2


def test_zeros_and_a_dominant_direction():
    assert refined_truncation(*decompose(torch.zeros(4, 6)), tolerance=0.2, max_error=1e-4) is None
    line = torch.outer(torch.ones(4), torch.ones(6))
    assert refined_truncation(*decompose(line), tolerance=0.9, max_error=1e-4).rank == 0
