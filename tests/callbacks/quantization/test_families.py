"""Models that are built differently: GPT-2's transposed layers, OPT's masks, Gemma's sliding windows."""

import pytest
import torch

from callbacks.quantization import Scheme
from callbacks.quantization.blocks import find_blocks
from lightning_modules import CausalLanguageModel

FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 32,
    },
    "gemma2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 4,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_reconstructed(family, segments, quantize):
    torch.manual_seed(0)
    network = CausalLanguageModel(family, model_args=FAMILIES[family], tokenizer="bytes").network
    before = network.eval()(segments, use_cache=False).logits
    scheme = Scheme(2, 16, activation_bits=8)
    engine = quantize(network, segments, scheme, epochs=15, lr_rounding=3e-2, cfp_activations=True)
    row = engine.progress.rows[0]
    assert row["loss_after"] < 0.9 * row["loss_before"]
    assert not torch.equal(network(segments, use_cache=False).logits, before)
    per_block = {"gpt2": 4, "opt": 6, "gemma2": 7}[family]
    assert len(engine.progress.matrices) == 2 * per_block
    _, blocks = find_blocks(network)
    assert len(blocks) == 2
