"""Exported folders load in transformers and give the very logits of the model in memory."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
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


def unpacked(words, bits, count):
    """Integers (count, n) of GPTQ's layout, as its kernels take them: from the lowest bit on, over word borders."""
    stream = (words.long() & 0xFFFFFFFF).unsqueeze(1) >> torch.arange(32)[None, :, None] & 1
    values = stream.flatten(0, 1).view(count, bits, -1)
    return (values << torch.arange(bits)[None, :, None]).sum(1)


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(3, 32), Scheme(2, -1), Scheme(8, 32, True), Scheme(4, 32, True)], ids=str
)
def test_gptq_holds_the_weights_in_memory(make_model, segments, tmp_path, tokens, trainer, scheme):
    module = make_model()
    options = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
    callback = RTN(**options, export="gptq")
    trainer(callbacks=[callback]).test(module, tokens, verbose=False)
    folder = tmp_path / "gptq"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["bits"], config["sym"]) == (
        "gptq_v2",
        scheme.bits,
        scheme.symmetric,
    )
    state = load_file(folder / "model.safetensors")
    for name in callback.matrices:
        weight = module.network.get_submodule(name).weight.detach()
        parts = {key: state[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        integers = unpacked(parts["qweight"], scheme.bits, weight.shape[1])  # (d_in, d_out)
        zeros = unpacked(parts["qzeros"].T, scheme.bits, weight.shape[0]).T  # (groups, d_out)
        index = parts["g_idx"].long()
        found = (integers - zeros[index]) * parts["scales"].float()[index]
        assert torch.equal(found.T, weight), name
        assert f"{name}.weight" not in state


def test_words_of_four_bits_are_those_of_the_published_layout():
    from callbacks.deploy.gptq import packed_bits

    column = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])[:, None]
    assert packed_bits(column, 4).tolist() == [[0x87654321 - 2**32]]
    thirds = torch.tensor([5] * 10 + [6] + [0] * 21)[:, None]  # the eleventh goes over the border of a word
    first, second, _ = (int(word) & 0xFFFFFFFF for word in packed_bits(thirds, 3).flatten())
    assert (first >> 30, second & 1) == (6 & 3, 6 >> 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"bits": 5}, "2, 3, 4 or 8 bits"), ({"activation_bits": 8}, "no quantized activations")],
)
def test_what_gptq_cannot_express_is_refused(make_model, tokens, trainer, options, reason):
    with pytest.raises(MisconfigurationException, match=rf"GPTQ layout cannot express layer.*{reason}"):
        trainer(callbacks=[RTN(**options, export="gptq")]).test(make_model(), tokens, verbose=False)


def test_an_export_is_loaded_and_compared(make_model, tokens, trainer, monkeypatch):
    pytest.importorskip("compressed_tensors")
    callback = RTN(bits=4, symmetric=True, export="both")
    trainer(callbacks=[callback]).test(make_model(), tokens, verbose=False)
    for found in callback.report["exported"].values():
        assert (found["checked"], found["logits_equal"]) == ("loaded in transformers", True)
        assert found["perplexity_loaded"] == found["perplexity_in_memory"]
    save = AutoModelForCausalLM.from_pretrained

    def broken(*given, **options):
        network = save(*given, **options)
        network.lm_head.weight.data[3] += 1
        return network

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    callback = RTN(bits=4, symmetric=True, export="dense")
    with pytest.warns(UserWarning, match="gives other logits than the model in memory"):
        trainer(callbacks=[callback]).test(make_model(), tokens, verbose=False)
    assert callback.report["exported"]["dense"]["logits_equal"] is False
