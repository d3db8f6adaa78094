import pytest
import torch

from callbacks.distillation.cka import (
    MinibatchCKA,
    hsic_biased,
    hsic_unbiased,
    linear_cka,
    linear_gram,
    rbf_cka,
)

RTOL = 1e-7


@pytest.fixture(params=["n12", "n32"])
def pair(request, golden, filling):
    group = golden["cka"][request.param]
    n, d1, d2 = group["n"], group["d1"], group["d2"]
    x = filling.inputs(f"ofakd/cka/{n}/x", (n, d1)).double()
    m = filling.inputs(f"ofakd/cka/{n}/m", (d1, d2)).double()
    y = filling.inputs(f"ofakd/cka/{n}/y", (n, d2)).double() + 0.5 * x @ m
    return group, x, y


def test_similarities_are_golden(pair):
    group, x, y = pair
    assert linear_cka(x, y).item() == pytest.approx(group["linear"], rel=RTOL)
    assert linear_cka(x, y, debiased=True).item() == pytest.approx(group["linear_debiased"], rel=RTOL)
    assert rbf_cka(x, y).item() == pytest.approx(group["rbf_1_0"], rel=RTOL)


def test_hsic_is_golden(pair):
    group, x, y = pair
    k, l = linear_gram(x), linear_gram(y)  # noqa: E741
    assert hsic_biased(k, l).item() == pytest.approx(group["hsic_biased_xy"], rel=RTOL)
    assert hsic_biased(k, k).item() == pytest.approx(group["hsic_biased_xx"], rel=RTOL)
    assert hsic_unbiased(k, l).item() == pytest.approx(group["hsic1_xy"], rel=RTOL)
    assert hsic_unbiased(k, k).item() == pytest.approx(group["hsic1_xx"], rel=RTOL)
    assert hsic_unbiased(l, l).item() == pytest.approx(group["hsic1_yy"], rel=RTOL)


def test_minibatches_are_golden(pair):
    group, x, y = pair
    half = len(x) // 2
    sums = MinibatchCKA(2, 1)
    for part in (slice(None, half), slice(half, None)):
        sums.update([x[part], y[part]], [y[part]])
    matrix = sums.compute()
    assert matrix[0, 0].item() == pytest.approx(group["minibatch_2x"], rel=RTOL)
    assert matrix[1, 0].item() == pytest.approx(1.0)


def test_minibatches_bear_features_with_a_large_mean():
    x, y = torch.randn(16, 50), torch.randn(16, 30)
    plain, shifted = MinibatchCKA(1, 1), MinibatchCKA(1, 1)
    plain.update([x.double()], [y.double()])
    shifted.update([x + 500], [y - 300])
    torch.testing.assert_close(shifted.compute(), plain.compute(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("debiased", [False, True])
def test_invariances(debiased):
    x, y = torch.randn(20, 6).double(), torch.randn(20, 9).double()
    rotation, _ = torch.linalg.qr(torch.randn(6, 6).double())
    value = linear_cka(x, y, debiased)
    assert linear_cka(x, x, debiased).item() == pytest.approx(1.0)
    for same in (x @ rotation, 7 * x, x + 3):
        torch.testing.assert_close(linear_cka(same, y, debiased), value)
    assert linear_cka(2 * x, x, debiased).item() == pytest.approx(1.0)


def test_feature_space_and_gram_space_agree():
    x, y = torch.randn(20, 6).double(), torch.randn(20, 9).double()
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (x.t() @ y).norm() ** 2
    wanted = cross / ((x.t() @ x).norm() * (y.t() @ y).norm())
    torch.testing.assert_close(linear_cka(x, y), wanted)


def test_unbiased_needs_four_samples():
    gram = linear_gram(torch.randn(3, 5))
    with pytest.raises(ValueError, match="at least 4"):
        hsic_unbiased(gram, gram)
