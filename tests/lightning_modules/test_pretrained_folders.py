"""Folders of language models that are not whole, not plain, or not of text alone."""

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from callbacks.deploy.compressed_tensors import export_model
from callbacks.quantization import RTN, Scheme
from callbacks.quantization.blocks import find_blocks
from callbacks.quantization.sequential import nearest_matrix
from lightning_modules import CausalLanguageModel
from lightning_modules.language_model import positions_of
from lightning_modules.text_classifier import TextClassifier

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 260,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    network.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def without_a_part(state):
    return {key: value for key, value in state.items() if "layers.1.mlp" not in key}


def behind_a_name(state):
    return {f"module.{key}": value for key, value in state.items()}


def test_a_whole_folder_is_taken(folder):
    assert CausalLanguageModel(str(folder), tokenizer="bytes").network.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_part, r"3 weights are not in the file and would stay random: model\.layers\.1\.mlp"),
        (behind_a_name, r"would stay random: lm_head.*the file has them behind 'module\.'"),
    ],
)
def test_missing_weights_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(MisconfigurationException, match=message):
        CausalLanguageModel(str(folder), tokenizer="bytes")


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("num_hidden_layers", 1, r"9 weights of blocks .*model\.layers\.1\."),
        ("tie_word_embeddings", True, None),
    ],
)
def test_a_configuration_that_leaves_weights_out(folder, key, value, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    if name is None:
        CausalLanguageModel(str(folder), tokenizer="bytes")
        return
    with pytest.raises(MisconfigurationException, match=name):
        CausalLanguageModel(str(folder), tokenizer="bytes")


def test_a_classifier_may_lack_its_head_alone(folder, tmp_path):
    config = AutoConfig.for_model("bert", **{**TINY, "max_position_embeddings": 16})
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(tmp_path / "bert")
    TextClassifier(str(tmp_path / "bert"), 2, tokenizer="bytes").load()
    rewrite(tmp_path / "bert", lambda state: {k: v for k, v in state.items() if "layer.1" not in k})
    with pytest.raises(MisconfigurationException, match=r"would stay random: bert\.encoder\.layer\.1"):
        TextClassifier(str(tmp_path / "bert"), 2, tokenizer="bytes").load()


@pytest.mark.parametrize("scheme", [Scheme(4, 32, symmetric=True), Scheme(3, 32)], ids=str)
def test_a_compressed_folder_is_dequantized_and_trains_whole(folder, tmp_path, scheme, capfd):
    pytest.importorskip("compressed_tensors")
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    names = [n for n, part in network.named_modules() if type(part) is torch.nn.Linear and "layers" in n]
    matrices = {name: nearest_matrix(network.get_submodule(name), scheme) for name in names}
    for name, matrix in matrices.items():
        matrix.install(network.get_submodule(name))
    export_model(tmp_path / "packed", network, None, matrices, "compressed-tensors")
    module = CausalLanguageModel(str(tmp_path / "packed"), tokenizer="bytes")
    loaded = module.network.state_dict()
    assert loaded.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(loaded[name], value), name
    assert all(parameter.requires_grad for parameter in module.network.parameters())
    bits = {module.network.get_submodule(name).weight_bits for name in names}
    assert bits == {float(scheme.bits)}
    assert not hasattr(module.network.lm_head, "weight_bits")
    assert not hasattr(module.network.config, "quantization_config")
    RTN(bits=2).check_run(None, module)  # it can be quantized again


def test_other_formats_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        MisconfigurationException, match=r"quantized already \(gptq\): only compressed-tensors"
    ):
        CausalLanguageModel(str(folder), tokenizer="bytes")


def test_the_blocks_of_a_multimodal_model_are_those_of_its_text():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TINY, "head_dim": 8, "max_position_embeddings": 32},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    network = AutoModelForCausalLM.from_config(config)
    path, blocks = find_blocks(network)
    assert "language_model" in path
    assert len(blocks) == 2
    assert positions_of(network) == 32


def test_the_block_that_overflows_in_float16_is_named(trainer, segments_of_text):
    module = CausalLanguageModel("llama", model_args=TINY, tokenizer="bytes")
    module.network.half()
    with torch.no_grad():
        module.network.model.layers[1].mlp.up_proj.weight.fill_(6e4)
        module.network.model.layers[1].mlp.gate_proj.weight.fill_(6e4)
    with pytest.raises(
        MisconfigurationException, match=r"hidden states of block 1 are not finite in float16"
    ):
        trainer().test(module, segments_of_text, verbose=False)
    with pytest.raises(MisconfigurationException, match=r"block 1 are not finite in float16: use bfloat16"):
        trainer(callbacks=[RTN(bits=8)]).test(module, segments_of_text, verbose=False)


@pytest.fixture
def segments_of_text():
    rows = [{"input_ids": torch.arange(3, 19) + index, "index": index} for index in range(2)]
    return torch.utils.data.DataLoader(rows, batch_size=2)
