"""CausalLanguageModel: perplexity as one counts it by hand, loading, training."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_modules import CausalLanguageModel
from lightning_modules.language_model import (
    TokenLikelihood,
    load_language_model,
    load_tokenizer,
    positions_of,
    token_nll,
)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def tiny(**options):
    return CausalLanguageModel("llama", model_args=TINY, tokenizer="bytes", **options)


class Segments(LightningDataModule):
    def __init__(self, count=7, batch_size=3, seq_len=12):
        super().__init__()
        self.seq_len = seq_len
        self.ids = torch.randint(3, 259, (count, seq_len), generator=torch.Generator().manual_seed(0))
        self.batch_size = batch_size

    def train_dataloader(self):
        rows = [{"input_ids": row, "index": index} for index, row in enumerate(self.ids)]
        return DataLoader(rows, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_perplexity_by_hand(trainer):
    module, data = tiny(), Segments()
    (found,) = trainer().test(module, data, verbose=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data.ids:
            scores = module.network(row[None]).logits[0].log_softmax(-1)
            for place in range(1, len(row)):
                total -= scores[place - 1, row[place]].item()
                count += 1
    assert found["test/tokens"] == count == 7 * 11
    assert found["test/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["test/nll"] == pytest.approx(total / count, rel=1e-5)


def test_perplexity_does_not_depend_on_the_batches(trainer):
    module = tiny()
    found = [
        trainer().test(module, Segments(batch_size=size), verbose=False)[0]["test/perplexity"]
        for size in (1, 3, 7)
    ]
    assert found == pytest.approx(found[:1] * 3, rel=1e-6)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    metric = TokenLikelihood()
    metric.update(token_nll(torch.zeros(2, 5, 37), torch.randint(0, 37, (2, 5))))
    assert metric.compute().item() == pytest.approx(37)


def test_a_collapsed_model_has_an_infinite_perplexity_and_sums_stay_exact():
    metric = TokenLikelihood()
    metric.update(torch.full((3,), 1e4))
    assert metric.compute() == math.inf
    tokens = TokenLikelihood("tokens")
    for _ in range(3):
        tokens.update(torch.zeros(10, 7))
    assert tokens.compute() == 210


def test_training_lowers_the_loss(trainer):
    module, data = tiny(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2)), Segments()
    (before,) = trainer().test(module, data, verbose=False)
    trainer(max_epochs=8).fit(module, data)
    (after,) = trainer().test(module, data, verbose=False)
    assert after["test/nll"] < 0.8 * before["test/nll"]


def test_predictions_sum_to_the_likelihood(trainer):
    module, data = tiny(), Segments()
    outputs = trainer().predict(module, data)
    (tested,) = trainer().test(module, data, verbose=False)
    total = sum(float(output["log_likelihood"].sum()) for output in outputs)
    tokens = sum(int(output["tokens"].sum()) for output in outputs)
    assert tokens == 77
    assert -total / tokens == pytest.approx(tested["test/nll"])
    assert torch.cat([output["index"] for output in outputs]).tolist() == list(range(7))


def test_folders_are_loaded_at_once_and_the_rest_when_a_run_starts(tmp_path):
    module = tiny()
    module.network.save_pretrained(tmp_path / "model")
    loaded = CausalLanguageModel(str(tmp_path / "model"), tokenizer="bytes")
    ids = torch.randint(3, 259, (1, 8))
    assert torch.equal(loaded(ids), module(ids))
    remote = CausalLanguageModel("nobody/has-this-model")
    assert "network" not in remote._modules
    with pytest.raises(MisconfigurationException, match=r"model 'nobody/has-this-model' cannot be loaded"):
        remote.configure_model()
    with pytest.raises(FileNotFoundError, match=r"there is no file 'gone\.gguf'"):
        CausalLanguageModel("gone.gguf").load()


def test_gguf_weights_are_plain_afterwards(tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    network = tiny().network
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, network)
    loaded = load_language_model(str(path))
    assert getattr(loaded.config, "quantization_config", None) is None
    loaded.save_pretrained(tmp_path / "plain")
    ids = torch.randint(3, 259, (1, 8))
    torch.testing.assert_close(loaded(ids).logits, network(ids).logits, rtol=1e-4, atol=1e-5)


def write_gguf(gguf, path, network):
    """The tensors of a Llama under GGUF's names, in float32."""
    writer = gguf.GGUFWriter(str(path), "llama")
    config = network.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for index in range(config.num_hidden_layers):
        for name, short in names.items():
            value = state[f"model.layers.{index}.{name}.weight"]
            count = heads.get(name.rpartition(".")[2])
            if count:  # GGUF interleaves the halves of rotary heads
                value = value.view(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{index}.{short}.weight", value.numpy())
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_mistakes(trainer):
    with pytest.raises(MisconfigurationException, match="set `tokenizer`"):
        CausalLanguageModel("llama", model_args=TINY)
    with pytest.raises(
        MisconfigurationException, match=r"seq_len is 40, but the model has only 32 positions"
    ):
        trainer().test(tiny(), Segments(seq_len=40), verbose=False)


BERT = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_models_that_see_later_tokens_are_refused(family):
    arguments = {**BERT, "intermediate_size": 16, "max_position_embeddings": 20}
    with pytest.raises(MisconfigurationException, match=rf"'{family}' .*is no causal language model"):
        CausalLanguageModel(family, model_args=arguments, tokenizer="bytes")
    CausalLanguageModel(family, model_args={**arguments, "is_decoder": True}, tokenizer="bytes")


def test_families_that_are_causal_by_construction_are_not_tried():
    arguments = {**BERT, "intermediate_size": 16, "max_position_embeddings": 20}
    CausalLanguageModel("gpt_neox", model_args=arguments, tokenizer="bytes")


def test_the_positions_of_a_text_model_inside_another_count():
    inner = SimpleNamespace(max_position_embeddings=32)
    network = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: inner))
    assert positions_of(network) == 32


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(tmp_path, monkeypatch):
    mapped = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.T", None],
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": mapped}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": mapped, "tokenizer_class": "T"}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for load in (load_language_model, load_tokenizer):
        with pytest.raises(MisconfigurationException, match=r"brings Python code of its own.*never run"):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_folder_is_named(tmp_path):
    tiny().network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage garbage")
    with pytest.raises(MisconfigurationException, match=r"model '.*' cannot be loaded"):
        load_language_model(str(tmp_path))
