"""The experiment on CBQ: its cells mean what they say, on a model that fits a test."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from callbacks.quantization import CrossBlockSettings, Scheme
from lightning_modules import CausalLanguageModel

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def effects(load):
    return load("cbq")


@pytest.fixture
def speed(load):
    return load("speed_cbq")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return CausalLanguageModel("llama", model_args=TINY, tokenizer="bytes").network.eval()


def test_every_cell_is_a_valid_setting(effects):
    for group, cells in effects.groups().items():
        for name, cell in cells.items():
            CrossBlockSettings(**cell.settings)
            assert cell.method in ("none", "rtn", "gptq", "cbq"), (group, name)
    assert {cell.scheme for cell in effects.groups()["sceptic"].values()} == {Scheme(2, 64)}


@pytest.mark.parametrize("method", ["none", "rtn", "gptq", "cbq"])
def test_a_cell_changes_its_blocks_only(effects, network, method):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calibration = torch.randint(3, 259, (16 * 8,))
    settings = {"epochs": 1, "batch_size": 8} if method == "cbq" else {}
    cell = effects.Cell(method, Scheme(3, 32), settings, 8, 3)
    effects.quantize(network, cell, calibration, 0, None)
    after = network.state_dict()
    changed = {name.split(".")[2] for name, value in after.items() if not value.equal(before[name])}
    assert changed == (set() if method == "none" else {"0", "1", "2", "3"})


def test_the_table_has_means_and_ranges(effects):
    runs = [
        {"sotu_perplexity": value, "seconds": 3.0, "peak_memory_bytes": 2e9, "seed": seed}
        for seed, value in enumerate((30.0, 34.0))
    ]
    table = effects.report("w3", {"CBQ": runs, "RTN": runs[:1]})
    assert "| CBQ | 32.00 (30.00-34.00) | 2 | 3 | 2.00 |" in table
    assert "| RTN | 30.00 | 1 | 3 | 2.00 |" in table


def test_every_variant_does_the_same_windows(speed):
    options = argparse.Namespace(
        model=None, hidden=64, blocks=3, segments=4, length=8, batch=2, epochs=1, bits=3, threads=1
    )
    found = {name: [speed.measure(name, options)] for name in speed.VARIANTS}
    assert {(run[0]["windows"], run[0]["steps"]) for run in found.values()} == {(2, 2)}
    assert len(speed.report(found).splitlines()) == 1 + len(speed.VARIANTS)


@pytest.mark.parametrize("name", ["our GPTQ", "our CBQ"])
def test_quantizers_beside_peers_leave_weights_on_a_grid(load, network, tmp_path, name):
    peers = load("quantizer_peers")
    network.save_pretrained(tmp_path)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 259, (8, 8)))
    result = tmp_path / "weights.safetensors"
    options = argparse.Namespace(only=name, model=tmp_path, tokens=tmp_path / "tokens.npy", result=result)
    options.__dict__ |= {"bits": 2, "group": 32, "blocks": 2, "threads": 1, "seed": 0, "bf16": False}
    found = peers.work(options)
    assert found["cpu_seconds"] > 0
    weights = load_file(result)
    assert {key.split(".")[2] for key in weights} == {"0", "1"}
    for weight in weights.values():
        assert max(len(group.unique()) for group in weight.unflatten(1, (-1, 32)).flatten(0, 1)) <= 4
    rows = {"full precision": {"sotu": 20.0}, name: {"sotu": 21.0, **found}}
    assert f"| {name} | 21.00 |" in peers.report(rows)
