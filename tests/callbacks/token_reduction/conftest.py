import json
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((GOLDEN / "ppt.json").read_text())


@pytest.fixture(scope="session")
def filling() -> ModuleType:
    """`fill` and `inputs`, with which the golden numbers were made."""
    spec = spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_vit():
    """A ViT with 16 patches and 3 heads; its attention is so uneven that images differ in their choices."""

    def make(distilled: bool = False, seed: int = 0, sharpness: float = 4.0, **options) -> VisionTransformer:
        torch.manual_seed(seed)
        kind = VisionTransformerDistilled if distilled else VisionTransformer
        defaults = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 5,
            "num_heads": 3,
            "num_classes": 7,
        }
        norm = partial(nn.LayerNorm, eps=1e-6)
        network = kind(**{**defaults, "norm_layer": norm, **options}).eval()
        for block in network.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=sharpness / 48**0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=0.1)
        return network

    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
