"""Blocks that are built otherwise: experts in 3-D parameters, inputs of their own, states that they share."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks.deploy.compressed_tensors import compression_config
from callbacks.deploy.saved_names import saved_names
from callbacks.quantization import CBQ, GPTQ, RTN, Scheme, resolve_schemes
from callbacks.quantization.activations import quantize_tensor, quantize_tokens
from callbacks.quantization.base import QuantizationCallback
from callbacks.quantization.blocks import BlockStack, find_blocks, linear_layers
from callbacks.quantization.budget import allocate
from callbacks.quantization.sequential import SequentialGPTQ, nearest_matrix
from callbacks.quantization.store import ProgressFile, as_plain, fingerprint
from lightning_modules import CausalLanguageModel
from tests.callbacks.quantization.conftest import SMALL

FEW = {"num_experts_per_tok": 1}
MIXTURES = {
    "olmoe": {**FEW, "num_experts": 3},
    "granitemoe": {**FEW, "num_local_experts": 3},
    "gpt_oss": {**FEW, "num_local_experts": 3, "head_dim": 8},
    "llama4_text": {**FEW, "num_local_experts": 3, "head_dim": 8, "intermediate_size_mlp": 48},
}
GEMMA4 = {
    "head_dim": 8,
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}


def build(family, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits(network, ids):
    with torch.no_grad():
        return network(ids, use_cache=False).logits


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_quantized_one_by_one(family, segments):
    network = build(family, **MIXTURES[family])
    before, state = logits(network, segments), set(network.state_dict())
    path, _ = find_blocks(network)
    layers = linear_layers(network, path)
    assert set(network.state_dict()) == state  # they are views
    experts = [name for name in layers if ".experts." in name]
    assert len(experts) == 2 * 3 * 2
    assert not any("router" in name or name.endswith("gate") for name in layers)
    for name in experts:
        matrix = nearest_matrix(layers[name], Scheme(2))
        matrix.install(layers[name])
        weight = layers[name].weight
        assert max(len(row.unique()) for row in weight) <= 4  # along the inputs
    assert not torch.equal(logits(network, segments), before)


@pytest.mark.parametrize("family", MIXTURES)
def test_gptq_sees_what_goes_into_each_expert(family, segments):
    network, plain = build(family, **MIXTURES[family]), build(family, **MIXTURES[family])
    before = logits(network, segments)
    path, _ = find_blocks(network)
    schemes = resolve_schemes(linear_layers(network, path), Scheme(3))
    SequentialGPTQ(network, path, schemes, segments, batch_size=4).run()
    for name, layer in linear_layers(plain, path).items():
        nearest_matrix(layer, schemes[name]).install(layer)
    errors = [(logits(each, segments) - before).square().mean() for each in (network, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_cbq_learns_experts_and_quantizes_their_inputs(segments, quantize):
    network, plain = (build("olmoe", **MIXTURES["olmoe"]) for _ in range(2))
    before, scheme = logits(network, segments), Scheme(3, activation_bits=8)
    engine = quantize(network, segments, scheme, epochs=8, lr_rounding=3e-2, rounding_rank="full")
    path, _ = find_blocks(plain)
    for layer in linear_layers(plain, path).values():
        nearest_matrix(layer, scheme).install(layer)
    errors = [(logits(each, segments) - before).square().mean() for each in (network, plain)]
    assert errors[0] < 0.8 * errors[1]
    quantized = logits(network, segments)
    for handle in engine.handles:
        handle.remove()
    assert not torch.equal(logits(network, segments), quantized)


def test_an_expert_that_no_token_reaches_is_rounded_with_a_warning(segments):
    network = build("olmoe", **MIXTURES["olmoe"])
    with torch.no_grad():
        for block in network.model.layers:
            block.mlp.gate.weight[2] = 0
            block.mlp.gate.weight[0] = -block.mlp.gate.weight[1]  # one of the two is positive
    schemes = resolve_schemes(linear_layers(network, "model.layers"), Scheme(3))
    with pytest.warns(UserWarning, match=r"no calibration token reached .*experts\.2\..* rounded to nearest"):
        matrices = SequentialGPTQ(network, "model.layers", schemes, segments).run()
    assert matrices["model.layers.0.mlp.experts.2.down_proj"].changed == 0


def test_the_report_says_what_share_of_the_blocks_is_quantized(tokens, trainer):
    options = {**SMALL, **MIXTURES["granitemoe"]}
    module = CausalLanguageModel("granitemoe", model_args=options, tokenizer="bytes")
    callback = RTN(bits=2, targets=["*experts*", "*moe*"])
    trainer(callbacks=[callback]).test(module, tokens, verbose=False)
    attention = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    total = callback.report["block_weights"]
    routers = 2 * 3 * 32
    assert callback.report["quantized_weights"] == total - attention - routers
    assert callback.report["quantized_block_share"] == pytest.approx(1 - (attention + routers) / total)


def test_routers_are_quantized_only_where_they_are_asked_for():
    options = {**SMALL, "num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    module = CausalLanguageModel("qwen2_moe", model_args=options, tokenizer="bytes")
    names = {f"model.layers.{index}.mlp.shared_expert_gate" for index in range(2)}
    for targets, wanted in ((None, False), (["Linear"], False), (["*.shared_expert_gate"], True)):
        _, schemes = RTN(bits=4, targets=targets)._resolve(module)
        assert (names <= schemes.keys()) is wanted


def test_a_share_that_is_left_out_is_named(tokens, trainer):
    module = CausalLanguageModel("llama", model_args=SMALL, tokenizer="bytes")
    for block in module.network.model.layers:
        block.mlp.odd = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.warns(
        UserWarning, match=r"% of the blocks' weights stay as they are: model\.layers\.\*\.mlp\.odd"
    ):
        trainer(callbacks=[RTN(bits=4)]).test(module, tokens, verbose=False)


def test_inputs_of_each_segment_are_recorded(segments, quantize):
    network = build("gemma4_text", **GEMMA4)
    stack = BlockStack(network, "model.layers", segments, torch.device("cpu"))
    outputs = []
    handle = network.model.layers[-1].register_forward_hook(lambda *given: outputs.append(given[2]))
    logits(network, segments)
    handle.remove()
    rows = torch.tensor([5, 2, 7])
    with torch.no_grad():
        found = stack.run(0, 2, stack.embed(segments[rows]), rows)
    torch.testing.assert_close(found, outputs[0][rows])


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "gemma4_text",
            {
                **GEMMA4,
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "layer_types": GEMMA4["layer_types"] * 2,
            },
            "hands more to later blocks",
        ),
        (
            "gemma3n_text",
            {**GEMMA4, "laurel_rank": 4, "layer_types": ["full_attention"] * 2},
            "hidden states have the shape",
        ),
    ],
)
def test_blocks_that_share_more_than_hidden_states_are_refused(family, options, reason, segments):
    with pytest.raises(MisconfigurationException, match=rf"cannot be calibrated.*{reason}.*Use RTN"):
        BlockStack(build(family, **options), "model.layers", segments, torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
        ("falcon", {"num_kv_heads": 1}),
        ("falcon", {"num_kv_heads": 1, "alibi": True}),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ],
)
def test_masks_that_grow_with_the_batch(family, options, segments):
    network = build(family, **options)
    path, blocks = find_blocks(network)
    assert len(linear_layers(network, path)) >= 4 * len(blocks)
    stack = BlockStack(network, path, segments[:1], torch.device("cpu"))
    with torch.no_grad():
        together = stack.run(0, 2, stack.embed(segments[:3]))
        alone = torch.cat([stack.run(0, 2, stack.embed(segments[n : n + 1])) for n in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    "callback", [RTN(activation_bits=8), GPTQ(), CBQ(epochs=1)], ids=["rtn", "gptq", "cbq"]
)
def test_layers_whose_weights_are_used_elsewhere_are_refused_by_name(callback, tokens, trainer):
    options = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    module = CausalLanguageModel("mamba", model_args=options, tokenizer="bytes")
    with pytest.raises(MisconfigurationException, match=r"backbone\.layers\.0\.mixer\.dt_proj.* never runs"):
        trainer(callbacks=[callback]).test(module, tokens, verbose=False)


def test_mamba_is_calibrated_without_them(tokens, trainer):
    options = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    module = CausalLanguageModel("mamba", model_args=options, tokenizer="bytes")
    callback = CBQ(bits=4, epochs=1, batch_size=4, ignore=["*.dt_proj"])
    trainer(callbacks=[callback]).test(module, tokens, verbose=False)
    assert len(callback.matrices) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_of_zeros_has_a_step_in_half_precision(dtype):
    x = torch.zeros(1, 2, 8, dtype=dtype)
    x[0, 1] = torch.linspace(-1, 1, 8)
    for symmetric in (True, False):
        found = quantize_tokens(x, 8, symmetric)
        assert found.dtype == dtype
        assert torch.equal(found[0, 0], x[0, 0])
        torch.testing.assert_close(found, x, atol=0.01, rtol=0)
    assert torch.equal(quantize_tensor(x.float(), torch.tensor(1e-8), 8)[0, 0], torch.zeros(8))


def test_mixtures_are_not_exported_packed():
    network = build("qwen3_moe", num_experts=3, num_experts_per_tok=1, moe_intermediate_size=24, head_dim=8)
    layers = linear_layers(network, "model.layers")
    matrices = {name: nearest_matrix(layer, Scheme(4, symmetric=True)) for name, layer in layers.items()}
    with pytest.raises(MisconfigurationException, match=r"keeps its experts as 3-D .*Export it as dense"):
        compression_config(network, matrices)


def test_names_are_those_of_the_files(monkeypatch):
    from callbacks.deploy import saved_names as module

    network = build("llama")
    assert saved_names(network, ["model.layers.0.mlp.up_proj"]) == {
        "model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj"
    }

    def older(network, state):
        return {key.replace("model.layers", "transformer.h"): value for key, value in state.items()}

    monkeypatch.setattr(module, "_written", older)
    found = saved_names(network, ["model.layers.0.mlp.up_proj"])
    assert found == {"model.layers.0.mlp.up_proj": "transformer.h.0.mlp.up_proj"}

    def merged(network, state):
        names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
        return {"gate_up": torch.cat([state.pop(name) for name in names]), **state}

    monkeypatch.setattr(module, "_written", merged)
    with pytest.raises(MisconfigurationException, match="is not one tensor in the files"):
        saved_names(network, ["model.layers.0.mlp.up_proj"])


def test_progress_of_another_configuration_or_shape(tmp_path):
    prints = [
        fingerprint(build("llama", rope_parameters={"rope_type": "default", "rope_theta": theta}), None)
        for theta in (1e4, 5e5)
    ]
    assert prints[0]["weights"] == prints[1]["weights"]
    assert prints[0]["configuration"] != prints[1]["configuration"]
    layer = torch.nn.Linear(8, 4)
    file = ProgressFile(tmp_path / "p.pt", {}, {"a": (4, 8)})
    saved = {"windows": 1, "learned": {}, "scales": {}, "thresholds": {}, "rows": []}
    file.write({**saved, "matrices": {"a": as_plain(nearest_matrix(layer, Scheme(4)))}})
    assert file.load().windows == 1
    with pytest.raises(MisconfigurationException, match="delete it to start anew"):
        ProgressFile(tmp_path / "p.pt", {}, {"a": (8, 4)}).load()


def test_bits_are_shared_out_by_what_rounding_costs(make_model, tokens, trainer, tmp_path):
    assert allocate(torch.tensor([[9.0, 1, 0], [2.0, 1, 0]]), [10, 10], (2, 3, 4), 3.0) == [4, 2]
    assert allocate(torch.tensor([[9.0, 1, 0], [2.0, 1, 0]]), [10, 10], (2, 3, 4), 2.5) == [3, 2]
    module, plain = make_model(), make_model()
    with torch.no_grad():
        before = plain.network.eval()(tokens.calibration).logits
    callback = RTN(group_size=32, average_bits=3.2, overrides={"*.0.mlp.down_proj": {"bits": 8}})
    trainer(callbacks=[callback]).test(module, tokens, verbose=False)
    free = {name: m for name, m in callback.matrices.items() if not name.endswith("0.mlp.down_proj")}
    sizes = {name: matrix.integers.numel() for name, matrix in free.items()}
    average = sum(matrix.scheme.bits * sizes[name] for name, matrix in free.items()) / sum(sizes.values())
    assert 3.05 < average <= 3.2
    assert len({matrix.scheme.bits for matrix in free.values()}) > 1
    report = json.loads((tmp_path / "rtn_report.json").read_text())
    assert report["average_bits"] == 3.2
    assert report["layers"]["model.layers.0.mlp.down_proj"]["scheme"].startswith("W8")
    uniform = RTN(bits=3, group_size=32, overrides={"*.0.mlp.down_proj": {"bits": 8}})
    trainer(callbacks=[uniform]).test(plain, tokens, verbose=False)
    with torch.no_grad():
        errors = [
            (each.network.eval()(tokens.calibration).logits - before).square().mean()
            for each in (module, plain)
        ]
    assert errors[0] < errors[1]
    with pytest.raises(ValueError, match="average_bits=9"):
        RTN(average_bits=9.0)


def test_the_callback_needs_inputs_unless_it_says_otherwise():
    assert QuantizationCallback.needs_inputs
    assert not RTN.needs_inputs
