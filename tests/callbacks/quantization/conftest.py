"""The golden numbers, a tiny Llama, and random calibration tokens."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from callbacks.quantization import CrossBlock, CrossBlockSettings, Scheme, resolve_schemes
from callbacks.quantization.blocks import find_blocks, linear_layers
from callbacks.quantization.windows import sliding_windows
from lightning_modules.language_model import CausalLanguageModel

GOLDEN = Path(__file__).parents[2] / "golden"
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 64,
}
"""Of a tiny model of any family."""


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDEN / "cbq.json").read_text())


@pytest.fixture(scope="session")
def inputs():
    """`inputs(label, shape)`, float64."""
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda label, shape: module.inputs(label, tuple(shape)).double()


@pytest.fixture
def make_model():
    """A random Llama of four blocks with large channels, as trained models have."""

    def make(seed: int = 0, **options) -> CausalLanguageModel:
        torch.manual_seed(seed)
        module = CausalLanguageModel("llama", model_args={**LLAMA, **options}, tokenizer="bytes")
        with torch.no_grad():
            for block in module.network.model.layers:
                block.input_layernorm.weight[3] = 12.0
                block.post_attention_layernorm.weight[7] = 9.0
            for name, parameter in module.network.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3.0 if "embed" not in name else 30.0)
        return module

    return make


@pytest.fixture
def segments():
    return torch.randint(3, 259, (8, 16), generator=torch.Generator().manual_seed(1))


class Tokens(LightningDataModule):
    """Random tokens to calibrate with and to measure on."""

    seq_len = 16

    def __init__(self, calibration: torch.Tensor, batch_size: int = 4) -> None:
        super().__init__()
        self.calibration = calibration
        self.batch_size = batch_size

    def calibration_segments(self) -> torch.Tensor:
        return self.calibration

    def test_dataloader(self) -> DataLoader:
        ids = torch.randint(3, 259, (8, 16), generator=torch.Generator().manual_seed(2))
        rows = [{"input_ids": row, "index": index} for index, row in enumerate(ids)]
        return DataLoader(rows, batch_size=self.batch_size)

    val_dataloader = predict_dataloader = train_dataloader = test_dataloader


@pytest.fixture
def tokens(segments):
    return Tokens(segments)


def quantize(network, segments, scheme=None, targets=("*",), **settings):
    """Run the engine; it is returned with its progress."""
    options = {"batch_size": 4, "cfp_weights": False, "cfp_activations": False, **settings}
    scheme = scheme or Scheme(2, 32)
    path, blocks = find_blocks(network)
    schemes = resolve_schemes(linear_layers(network, path), scheme, targets)
    extra = {
        key: options.pop(key)
        for key in ("progress", "on_window", "cache_directory", "offload")
        if key in options
    }
    chosen = CrossBlockSettings(**options)
    windows = sliding_windows(len(blocks), chosen.window, chosen.overlap)
    engine = CrossBlock(network, path, windows, schemes, segments, chosen, **extra)
    engine.run()
    return engine


@pytest.fixture(name="quantize")
def _quantize():
    return quantize
