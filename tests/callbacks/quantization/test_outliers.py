"""CFP: the detector's invariances, and folds that do not change the model."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from callbacks.quantization.folding import FOLDS, apply_fold, folds_of
from callbacks.quantization.outliers import channel_scales, detect_outliers, truncated, two_sided_scales
from callbacks.quantization.scheme import Scheme


@pytest.fixture
def values():
    values = torch.randn(500, dtype=torch.float64).abs()
    values[[3, 70]] = torch.tensor([9.0, 11.0], dtype=torch.float64)
    return values


def test_detection_scales_with_its_input_and_ignores_its_order(values):
    found, scaled = detect_outliers(values), detect_outliers(7 * values)
    assert found.outliers == 2
    assert scaled.threshold == pytest.approx(7 * found.threshold)
    assert (scaled.split, scaled.coarse) == (found.split, found.coarse)
    assert detect_outliers(values[torch.randperm(500)]) == found


def test_quartiles_are_those_of_the_ordered_values():
    values = torch.arange(1.0, 13)  # of 12, the 4th and the 10th
    assert detect_outliers(values).coarse_threshold == 10 + 1.5 * (10 - 4)
    assert detect_outliers(values, coarse_factor=0.0, min_gap=10.0).coarse == 2


def test_constants_and_nonsense():
    assert detect_outliers(torch.full((9,), 2.0)).outliers == 0
    with pytest.raises(ValueError, match="no values"):
        detect_outliers(torch.zeros(0))
    with pytest.raises(ValueError, match="at least 0"):
        detect_outliers(torch.tensor([1.0, -2.0]))
    with pytest.raises(ValueError, match="finite"):
        detect_outliers(torch.tensor([1.0, float("nan")]))


def test_the_largest_channel_ends_at_the_square_root(values):
    scales, found = channel_scales(values)
    assert (scales != 1).sum() == 2
    wanted = (values.max() * found.threshold) ** 0.5
    assert float((values / scales).max()) == pytest.approx(float(wanted))
    assert torch.equal((values / scales).argsort(), values.argsort())


def test_two_sided_leaves_a_silent_side_alone():
    assert torch.equal(two_sided_scales(torch.ones(8), torch.zeros(8)), torch.ones(8))


def test_truncation_by_matrix_and_by_row():
    weight = torch.tensor([[1.0, -5.0], [2.0, 0.5]])
    assert truncated(weight, 1.5).tolist() == [[1, -1.5], [1.5, 0.5]]
    assert truncated(weight, torch.tensor([[3.0], [1.0]])).tolist() == [[1, -3], [1, 0.5]]


def logits(network, ids):
    with torch.no_grad():
        return network(ids, use_cache=False).logits


def test_scaling_llama_changes_only_the_channels(make_model, segments, quantize):
    module = make_model()
    network = module.network.eval()
    before = logits(network, segments)
    seen: list[torch.Tensor] = []

    def look(layer, arguments):
        seen.append(arguments[0].abs().amax((0, 1)))

    linear = network.model.layers[0].self_attn.q_proj
    handle = linear.register_forward_pre_hook(look)
    logits(network, segments)
    handle.remove()
    engine = quantize(network, segments, Scheme(16, activation_bits=8), epochs=0, cfp_activations=True)
    for handle in engine.handles:
        handle.remove()
    after = logits(network, segments)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    scales = engine.progress.scales["0/0"]
    largest = seen[0].argmax()
    assert scales[largest] > 1.2
    linear.register_forward_pre_hook(look)
    logits(network, segments)
    torch.testing.assert_close(seen[-1][largest], seen[0][largest] / scales[largest])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_opt_folds_through_relu_only(segments, activation, recwarn):
    options = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OPTConfig(
        **options,
        vocab_size=259,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
        activation_function=activation,
    )
    network = OPTForCausalLM(config).eval()
    block = network.model.decoder.layers[0]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]
    folds = folds_of(block, names)
    assert any(fold.consumers == ("fc2",) for fold in folds) == (activation == "relu")
    before = logits(network, segments)
    for fold in folds:
        width = block.get_submodule(fold.consumers[0]).in_features
        apply_fold(fold, block, 1 + torch.rand(width))
    torch.testing.assert_close(logits(network, segments), before, rtol=1e-4, atol=1e-5)


def test_a_fold_needs_all_its_readers(make_model):
    block = make_model().network.model.layers[0]
    assert folds_of(block, ["self_attn.q_proj", "mlp.down_proj"]) == [FOLDS[2]]


def test_a_fold_that_moves_the_output_is_undone(make_model, segments, quantize, monkeypatch):
    from callbacks.quantization import folding

    # up_proj also feeds nothing else, but gate_proj is inside the SiLU: dividing it is wrong
    wrong = folding.Fold("mlp.gate_proj", ("mlp.down_proj",), "rows")
    monkeypatch.setattr(folding, "FOLDS", (wrong,))
    network = make_model().network.eval()
    with torch.no_grad():
        for block in network.model.layers:
            block.mlp.up_proj.weight[5] *= 40
    before = {name: value.clone() for name, value in network.state_dict().items()}
    quantize(network, segments, Scheme(16, activation_bits=8), epochs=0, cfp_activations=True)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_a_value_on_the_vendors_bound_is_no_outlier():
    """Quantiles 0.2 and 0.8 are 1, so the bound is 1: what lies on it is not among the coarse outliers."""
    maxima = torch.tensor([1.0] * 9 + [2.0, 2.5])
    scales = two_sided_scales(maxima, torch.zeros(11))
    torch.testing.assert_close(scales[:10], torch.ones(10))
    assert scales[10].item() == pytest.approx(1.25**0.7)
