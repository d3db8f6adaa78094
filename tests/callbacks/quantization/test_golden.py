"""The golden numbers of the spec, from a float64 oracle, the vendor's smoother and compressed-tensors."""

from functools import partial

import pytest
import torch

from callbacks.deploy.compressed_tensors import packed_tensors
from callbacks.quantization.activations import quantize_tokens, token_steps
from callbacks.quantization.error_feedback import gptq_integers
from callbacks.quantization.grid import Grid, fit_grid, from_integers, to_integers
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.losses import hidden_error, reconstruction_loss
from callbacks.quantization.outliers import channel_scales, detect_outliers, two_sided_scales
from callbacks.quantization.rounding import (
    LearnedRounding,
    beta_at,
    rect,
    rect_inverse,
    rounding_penalty,
)
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.windows import sliding_windows

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def close(found, wanted):
    assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64))


def test_weight_rtn(golden, inputs):
    for case in golden["weight_rtn"]:
        weight = inputs(case["label"], case["shape"])
        if case["modify"] == "abs":
            weight = weight.abs()
        elif case["modify"] != "none":
            weight[1] = 0
        grid = fit_grid(weight, case["bits"], case["group"], case["symmetric"])
        integers = to_integers(weight, grid)
        close(grid.scale, case["scale"])
        assert grid.zero_point.int().tolist() == case["zero_point"]
        assert integers.int().tolist() == case["q"]
        close(from_integers(integers, grid), case["dequant"])


def test_activations_per_token(golden, inputs):
    for case in golden["act_per_token"]:
        x = inputs(case["label"], case["shape"])
        close(quantize_tokens(x, case["bits"], case["symmetric"]), case["out"])
        if case["symmetric"]:
            close(token_steps(x, case["bits"])[..., 0], case["scale"])


def test_rect_and_its_inverse(golden):
    v = torch.tensor(golden["rect"]["V"], dtype=torch.float64, requires_grad=True)
    rect(v).sum().backward()
    close(rect(v), golden["rect"]["delta"])
    close(v.grad, golden["rect"]["ddelta_dV"])
    fractions = torch.tensor(golden["rect_inverse"]["frac"], dtype=torch.float64)
    close(rect_inverse(fractions), golden["rect_inverse"]["V0"])


def test_penalty_and_schedule(golden):
    for case in golden["l_com"]:
        penalty = rounding_penalty(torch.tensor(case["delta"], dtype=torch.float64), case["beta"])
        close(penalty, case["per_element"])
        close(penalty.mean(), case["mean"])
        close(penalty.sum(), case["sum"])
    case = golden["beta_schedule"]
    found = [
        beta_at(step, case["total"], case["start"], case["end"], case["warmup"]) for step in case["steps"]
    ]
    assert found == pytest.approx(case["beta"])


@pytest.mark.parametrize("index", range(2))
def test_lora_rounding(golden, inputs, index):
    case = golden["lora_rounding"][index]
    out, inp, rank = case["out"], case["inp"], case["rank"]
    shapes = {"W": (out, inp), "A1": (out, rank), "A2": (rank, inp)}
    weight, left, right = (inputs(case["labels"][name], shape) for name, shape in shapes.items())
    rounding = LearnedRounding(weight, case["bits"], case["group"], case["symmetric"], rank)
    rounding.hard = False
    grid = fit_grid(weight, case["bits"], case["group"], case["symmetric"])
    assert (
        torch.equal(rounding.integers().double(), to_integers(weight, grid)) == case["init_hard_equals_rtn"]
    )
    # the golden deviation counts what the clamp cuts off, too
    deviation = (rounding() - weight).abs().amax().item()
    assert deviation == pytest.approx(case["init_w_soft_max_abs_dev_from_W_inside_range"], abs=1e-6)
    with torch.no_grad():
        rounding.left.copy_(left)
        rounding.right.copy_(case["A2_multiplier"] * right)
    close(rounding.logits(), case["V"])
    close(rect(rounding.logits()), case["delta"])
    close(rounding(), case["w_soft"])
    rounding.hard = True
    assert rounding.integers().tolist() == case["q_hard"]
    close(rounding(), case["w_hard"])


def values_of(case, inputs):
    if case["how"].startswith("constant"):
        values = torch.full((case["n"],), 0.5, dtype=torch.float64)
    else:
        values = inputs(case["label"], (case["n"],)).abs()
    if "power" in case["how"]:
        values = values**1.5
    for place, value in case["set"].items():
        values[int(place)] = value
    return values


@pytest.mark.parametrize(("rule", "min_gap"), [("literal", 0.0), ("guarded_kappa_0p1", 0.1)])
def test_detection(golden, inputs, rule, min_gap):
    for case in golden["cfp_detect"]:
        wanted = case[rule]
        found = detect_outliers(values_of(case, inputs), case["lam1"], case["lam2"], min_gap)
        assert found.coarse_threshold == pytest.approx(wanted["T"], rel=1e-5)
        assert (found.coarse, found.outliers, found.split) == (
            wanted["n_coarse"],
            wanted["n_outliers"],
            wanted["i"],
        )
        assert found.threshold == pytest.approx(wanted["threshold"], rel=1e-5)
        if wanted["M"] is not None:
            assert found.merit == pytest.approx(wanted["M"], rel=1e-5, abs=1e-6)


def test_channel_scales(golden, inputs):
    for case in golden["cfp_act_scale"]:
        maxima = inputs(case["label"], (case["n"],)).abs() + 0.1
        for place, value in case["set"].items():
            maxima[int(place)] = value
        scales, found = channel_scales(maxima)
        assert found.threshold == pytest.approx(case["threshold"], rel=1e-5)
        assert found.outliers == case["n_outliers"]
        assert_scales(scales, case["scale_at"])
        assert (maxima / scales).amax().item() == pytest.approx(case["max_after"], rel=1e-5)


def assert_scales(scales, wanted):
    different = {str(place): scales[place].item() for place in (scales != 1).nonzero().flatten().tolist()}
    assert different == pytest.approx(wanted, rel=1e-5)


def test_two_sided_scales(golden, inputs):
    for case in golden["cfp_act_scale_two_sided"]:
        maxima = inputs(case["label_max"], (case["n"],)).abs() + 0.1
        minima = -(inputs(case["label_min"], (case["n"],)).abs() + 0.1)
        for place, value in case["set"].items():
            (maxima if value > 0 else minima)[int(place)] = value
        assert_scales(two_sided_scales(maxima, minima), case["scale_at"])


def test_windows(golden):
    for case in golden["windows"]:
        found = sliding_windows(case["n_blocks"], case["window"], case["overlap"])
        assert [list(window) for window in found] == case["windows"]


def test_reconstruction_loss(golden, inputs):
    for case in golden["reconstruction_loss"]:
        target, homologous, output = (
            inputs(case["labels"][key], case["shape"]) for key in ("fp", "homo", "quant")
        )
        close(hidden_error(target, output, kl=False), case["mse_fp_q"])
        close(hidden_error(target, output, l2=False), case["kl_fp_q"])
        close(hidden_error(homologous, output, kl=False), case["mse_homo_q"])
        close(hidden_error(homologous, output, l2=False), case["kl_homo_q"])
        close(reconstruction_loss(target, homologous, output), case["rec"])
        close(reconstruction_loss(target, None, output), case["rec_without_homologous"])


def test_gptq(golden, inputs):
    for case in golden["gptq_baseline"]:
        rows, columns = case["rows"], case["shape"][1]
        weight = inputs(case["label_W"], case["shape"])
        lower = torch.tril(torch.ones(columns, columns, dtype=torch.float64), -1)
        mixing = torch.eye(columns, dtype=torch.float64) + 0.5 / columns * lower
        mixed = inputs(case["label_X"], (rows, columns)) @ mixing
        hessian = 2 * mixed.T @ mixed / rows
        for block in (128, 3):  # putting updates off changes nothing
            integers, grid = gptq_integers(
                weight, hessian, case["bits"], case["group"], damp=case["damp"], block=block
            )
            assert integers.int().tolist() == case["q"]
            error = mixed @ (from_integers(integers, grid).double() - weight).T
            assert error.square().mean().item() == pytest.approx(case["out_mse_gptq"], rel=1e-5)
        nearest = fit_grid(weight, case["bits"], case["group"])
        error = mixed @ (from_integers(to_integers(weight, nearest), nearest) - weight).T
        assert error.square().mean().item() == pytest.approx(case["out_mse_rtn"], rel=1e-5)


def test_packed_weights(golden):
    pytest.importorskip("compressed_tensors")
    for case in golden["pack_int32"]:
        rows, columns, bits = *case["shape"], case["bits"]
        index = torch.arange(rows * columns).view(rows, columns)
        integers = (7 * index + 3) % 2**bits - 2 ** (bits - 1)
        grid = Grid(torch.ones(rows, 1), torch.zeros(rows, 1), 0, 0)
        matrix = QuantizedMatrix.of(Scheme(bits, symmetric=True), integers, grid)
        tensors = packed_tensors("layer", matrix)
        assert tensors["layer.weight_packed"].dtype == torch.int32
        assert tensors["layer.weight_packed"].tolist() == case["packed"]
        assert tensors["layer.weight_shape"].tolist() == [rows, columns]
