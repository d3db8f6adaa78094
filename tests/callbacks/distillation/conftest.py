import json
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from lightning_modules.classification import ImageClassifier

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = {
    "resnet": ("resnet10t", {"stem_width": 8, "channels": (8, 16, 24, 32)}),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "depth": 4, "embed_dim": 16, "num_heads": 2},
    ),
}


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((GOLDEN / "ofakd.json").read_text())


@pytest.fixture(scope="session")
def filling() -> ModuleType:
    """`fill`, `values` and `inputs`, with which the golden numbers were made."""
    spec = spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def check_statistics():
    """Compare a tensor with a statistics block of the golden file."""

    def check(tensor: Tensor, block: dict, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        flat = tensor.detach().double().flatten()
        assert list(tensor.shape) == block["shape"]
        assert flat.mean().item() == pytest.approx(block["mean"], rel=rtol, abs=atol)
        assert flat.std(correction=0).item() == pytest.approx(block["std"], rel=rtol, abs=atol)
        assert flat.abs().sum().item() == pytest.approx(block["abs_sum"], rel=rtol)
        assert flat[:8].tolist() == pytest.approx(block["first8"], rel=rtol, abs=atol)
        assert flat[block["at_index"]].tolist() == pytest.approx(block["at"], rel=rtol, abs=atol)

    return check


@pytest.fixture
def tiny_student():
    """A factory of ImageClassifiers of 4 classes for 32 pixels: `resnet` (CNN with BN) or `vit` (tokens)."""

    def make(family: str = "resnet", **options) -> ImageClassifier:
        name, model_args = TINY[family]
        options = {"optimizer": partial(torch.optim.SGD, lr=0.05), **options}
        return ImageClassifier(name, 4, model_args=model_args, **options)

    return make


@pytest.fixture
def tiny_teacher():
    """A factory of frozen-to-be networks of 4 classes for 32 pixels: `mixer`, `resnet` or `vit`."""

    def make(family: str = "mixer") -> nn.Module:
        if family == "mixer":
            return MlpMixer(num_classes=4, img_size=32, patch_size=4, num_blocks=4, embed_dim=16)
        name, model_args = TINY[family]
        return timm.create_model(name, num_classes=4, **model_args)

    return make
