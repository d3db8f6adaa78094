"""Exported folders load in transformers and give the very logits of the model in memory."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks.deploy.compressed_tensors import export_model, form_of
from callbacks.quantization import RTN, Scheme
from callbacks.quantization.cbq import CBQ
from callbacks.quantization.sequential import nearest_matrix
from lightning_modules import CausalLanguageModel


def logits(network, ids):
    with torch.no_grad():
        return network(ids, use_cache=False).logits


def test_dense_equals_the_model_in_memory(make_model, tokens, trainer, tmp_path, segments):
    module = make_model()
    callback = CBQ(bits=3, group_size=32, epochs=1, batch_size=4, export="dense")
    (measured,) = trainer(callbacks=[callback]).test(module, tokens, verbose=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, segments), logits(module.network.eval(), segments))
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("ab").input_ids[:2] == [100, 101]
    size = callback.report["exported"]["dense"]["bytes_on_disk"]
    assert size == (tmp_path / "dense" / "model.safetensors").stat().st_size
    again = CausalLanguageModel(str(tmp_path / "dense"), tokenizer="bytes")
    (remeasured,) = trainer().test(again, tokens, verbose=False)
    assert remeasured == measured


SCHEMES = [
    Scheme(2, 32, symmetric=True),
    Scheme(3, 32, symmetric=True),
    Scheme(4, -1, symmetric=True),
    Scheme(4, 32),
    Scheme(2, 32),
    Scheme(8, -1, symmetric=True, activation_bits=8),
    Scheme(4, -1, symmetric=True, activation_bits=8),
    Scheme(4, -1, symmetric=True, activation_bits=4),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compressed_tensors_equal_the_model_in_memory(make_model, segments, tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    network = make_model().network.eval()
    names = [
        name
        for name, part in network.named_modules()
        if type(part) is torch.nn.Linear and name.startswith("model.")
    ]
    matrices = {name: nearest_matrix(network.get_submodule(name), scheme) for name in names}
    for name, matrix in matrices.items():
        matrix.install(network.get_submodule(name))
    found = export_model(tmp_path / "out", network, None, matrices, "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"] == form_of(scheme)
    dense = export_model(tmp_path / "dense", network, None, matrices, "dense")
    assert found["bytes_on_disk"] < dense["bytes_on_disk"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, segments), logits(network, segments))


def test_packed_weights_without_the_package_are_refused_before_calibration(
    make_model, tokens, trainer, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    callback = RTN(symmetric=True, export="compressed-tensors")
    with pytest.raises(MisconfigurationException, match=r"featherlight\[llm\]"):
        callback.setup(trainer(callbacks=[callback]), make_model(), "test")


def test_layers_of_two_kinds_get_groups_of_their_own(make_model, segments, tmp_path):
    pytest.importorskip("compressed_tensors")
    network = make_model().network.eval()
    matrices = {}
    for name, part in list(network.named_modules()):
        if type(part) is torch.nn.Linear and name.startswith("model.layers.1."):
            bits = 8 if "down_proj" in name else 4
            matrices[name] = nearest_matrix(part, Scheme(bits, 32, symmetric=True))
            matrices[name].install(part)
    export_model(tmp_path / "out", network, None, matrices, "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4, 8}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, segments), logits(network, segments))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation_bits": 8}, "symmetric weights per channel"),
        ({"activation_bits": 8, "symmetric": True, "group_size": 32}, "symmetric weights per channel"),
        ({"bits": 16, "activation_bits": 8}, "its weights are not quantized"),
        (
            {"activation_bits": 8, "symmetric": True, "activation_mode": "dynamic_token_asymmetric"},
            "zero points of activations",
        ),
    ],
)
def test_what_the_format_cannot_express_is_refused_before_calibration(
    make_model, tokens, trainer, options, reason
):
    callback = RTN(**options, export="compressed-tensors")
    with pytest.raises(MisconfigurationException, match=rf"cannot express layer.*{reason}.*as dense"):
        trainer(callbacks=[callback]).test(make_model(), tokens, verbose=False)
