"""Folds of CFP in families with other norms and readers, with a massive activation in the first token."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from callbacks.quantization import Scheme
from tests.callbacks.quantization.conftest import SMALL

TOKENS = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}


def network_with_a_massive_activation(family, dtype, segments):
    torch.manual_seed(0)
    options = SMALL | TOKENS | ({"head_dim": 8} if "gemma" in family else {})
    config = AutoConfig.for_model(family, **options)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
            elif "norm" in name and "q_norm" not in name and "k_norm" not in name:
                parameter[3] += 11.0
        network.get_input_embeddings().weight[segments[0, 0], 9] = 3e4
    segments[:, 0] = segments[0, 0]
    return network


@pytest.mark.parametrize(
    ("family", "folds"),
    [("llama", 4), ("gemma2", 4), ("gemma3_text", 4), ("cohere", 3), ("olmo2", 2), ("exaone4", 2)],
)
def test_folds_are_exact_for_every_token(family, folds, segments, quantize):
    network = network_with_a_massive_activation(family, torch.float32, segments).double()
    with torch.no_grad():
        before = network(segments, use_cache=False).logits
    scheme = Scheme(16, activation_bits=8)
    options = {"epochs": 0, "cfp_activations": True, "batch_size": 2}
    engine = quantize(network, segments, scheme, **options)
    for handle in engine.handles:
        handle.remove()
    with torch.no_grad():
        after = network(segments, use_cache=False).logits
    error = (after - before).abs().amax(-1) / before.abs().amax(-1)
    assert error.max() < 1e-3
    assert engine.progress.scales
    made = {key.split("/")[1] for key in engine.progress.scales}
    assert len(made) <= folds


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_folds_of_bfloat16_are_kept(family, segments, quantize):
    scheme, options = Scheme(16, activation_bits=8), {"epochs": 0, "cfp_activations": True, "batch_size": 2}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        network = network_with_a_massive_activation(family, dtype, segments)
        found.append(set(quantize(network, segments, scheme, **options).progress.scales))
    assert found[0] == found[1] != set()
