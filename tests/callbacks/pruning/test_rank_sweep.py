"""The sweep over all layers against the exact truncation of each: gradients, error estimates, failures."""

import warnings

import pytest
import torch

from callbacks.pruning.rank_loss import exact_truncation, gram, rank_loss, truncation_along
from callbacks.pruning.rank_sweep import RankSweep, add_rank_gradients, gradient_error

SHAPES = [(256, 600), (600, 256), (256, 256), (160, 1440), (96, 300), (12, 40)]


def weight_of(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape)
    if kind == "sparse":
        return weight * (torch.rand(shape) < 0.02)
    if kind == "flat":
        return weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if kind == "one direction":
        values[0] = 0.7 * values.norm()
    else:
        values = torch.arange(1, len(values) + 1.0) ** (-0.5 if kind == "slow decay" else -1.0)
    return (left * values) @ right


KINDS = ["flat", "slow decay", "fast decay", "one direction", "sparse"]


@pytest.mark.parametrize("tolerance", [0.1, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_exact(kind, tolerance):
    weights = {str(shape): weight_of(kind, shape) for shape in SHAPES}
    sweep = RankSweep(tolerance)
    truncations = sweep(weights)
    if kind in ("flat", "sparse"):
        assert not sweep.repeated, "single precision is enough"
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    add_rank_gradients(truncations, weights, gradients, scale=len(weights))
    for name, weight in weights.items():
        loss, exact, rank = rank_loss(weight.double(), tolerance)
        assert truncations[name].rank == rank
        assert truncations[name].loss == pytest.approx(loss, abs=1e-6)
        assert float((gradients[name] - exact).norm() / exact.norm()) < 1e-4, name
        assert float((gradients[name] - exact).abs().max()) < 1e-4 * float(exact.abs().max()), name


@pytest.mark.parametrize("tolerance", [0.1, 0.2, 0.7])  # the basis spans the dropped side, the kept side
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_single_precision_is_below_its_estimate(kind, tolerance):
    for shape in SHAPES[:4]:
        weight = weight_of(kind, shape)
        eigenvalues, eigenvectors = torch.linalg.eigh(gram(weight))
        shares = eigenvalues.double().clamp_min(0) / float(eigenvalues.sum())
        truncation = truncation_along(eigenvalues, eigenvectors, float(eigenvalues.sum()), tolerance)
        _, exact, rank = rank_loss(weight.double(), tolerance)
        assert truncation.rank == rank
        assert -1 <= truncation.loss <= 0
        if rank == 0:
            continue  # the gradient is exactly 0
        gradient = truncation.add_gradient(weight, torch.zeros_like(weight))
        error = float((gradient - exact).norm() / exact.norm())
        assert error < 1e-5 + gradient_error(shares, truncation, 2**-23), (shape, error)


def test_a_layer_beyond_the_bound_is_decomposed_in_double_precision():
    weights = {"easy": weight_of("sparse", (256, 600)), "small": weight_of("flat", (12, 40))}
    # two eigenvalues 1e-8 apart on either side of the cut
    left = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    values = torch.linspace(1, 2, 200, dtype=torch.float64)
    cut = 200 - exact_truncation(left * values, 0.2).rank
    values[cut] = values[cut - 1] + 1e-8
    weights["hard"] = (left * values).float()
    sweep = RankSweep(0.2)
    truncations = sweep(weights)
    assert sweep.repeated == ["hard"]
    assert list(truncations) == list(weights)
    exact = exact_truncation(weights["hard"], 0.2)
    torch.testing.assert_close(truncations["hard"].basis, exact.basis.float())


def test_weights_too_small_for_single_precision_are_counted():
    weights = {"small": 1e-22 * weight_of("flat", (96, 300))}
    truncation = RankSweep(0.2)(weights)["small"]
    assert truncation.tail == pytest.approx(RankSweep(0.2)({"w": 1e22 * weights["small"]})["w"].tail)


def test_nearly_equal_choices_of_k_are_decided_in_double_precision():
    values = torch.full((200,), 200**-0.5)
    weights = {"tie": torch.diag(values) @ torch.linalg.qr(torch.randn(200, 200))[0]}
    sweep = RankSweep(0.2025)  # half-way between 40 and 41 dropped directions
    sweep(weights)
    assert sweep.repeated == ["tie"]


def test_zeros_are_not_counted_and_one_row_has_no_gradient():
    weights = {"zero": torch.zeros(200, 300), "row": torch.randn(1, 9), "full": torch.randn(20, 30)}
    truncations = RankSweep(0.2)(weights)
    assert list(truncations) == ["row", "full"]
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    mean = add_rank_gradients(truncations, weights, gradients, scale=2.0)
    loss, gradient, _ = rank_loss(weights["full"], 0.2)
    assert mean == pytest.approx((loss - 1) / 2)
    torch.testing.assert_close(gradients["full"], gradient)
    assert not gradients["row"].any()
    assert not gradients["zero"].any()
    assert add_rank_gradients({}, weights, gradients, 1.0) == 0


def test_gradients_are_added_in_any_memory_order_and_precision():
    weight = torch.randn(16, 8, 3, 3)
    exact = rank_loss(weight, 0.2)[1]
    for changed in (weight.to(memory_format=torch.channels_last), weight.bfloat16()):
        gradient = torch.ones_like(changed)
        add_rank_gradients(RankSweep(0.2)({"w": changed}), {"w": changed}, {"w": gradient}, 1.0)
        tolerance = 1e-6 if changed.dtype == torch.float32 else 0.01
        torch.testing.assert_close(gradient.float(), 1 + exact, rtol=tolerance, atol=tolerance)


def test_a_failed_decomposition_falls_back_and_then_leaves_out_with_one_warning(monkeypatch):
    weights = {"bad": torch.randn(200, 200), "good": torch.randn(10, 10)}
    real = torch.linalg.eigh

    def fails(matrix, dtypes):
        if matrix.dtype in dtypes and matrix.shape[-1] == 200:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    sweep = RankSweep(0.2)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: fails(matrix, [torch.float32]))
    assert set(sweep(weights)) == {"bad", "good"}
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: fails(matrix, [torch.float32, torch.float64]))
    with pytest.warns(UserWarning, match="leaves out bad"):
        assert set(sweep(weights)) == {"good"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(sweep(weights)) == {"good"}


@pytest.mark.parametrize("entries", [1, 2 * 96**2, 1 << 24])
def test_layers_of_one_size_give_what_each_gives_alone(monkeypatch, entries):
    monkeypatch.setattr("callbacks.pruning.rank_sweep._BATCH", entries)
    weights = {str(seed): torch.randn(96, 100 + seed).T for seed in range(3)}
    together = RankSweep(0.2)(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(together[name].basis, RankSweep(0.2)({name: weight})[name].basis)
