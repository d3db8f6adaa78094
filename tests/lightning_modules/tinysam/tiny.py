"""A promptable segmenter for tests."""

import json
from pathlib import Path

import torch

from lightning_modules.tinysam.network import SAM, TinyViT

GOLDEN = Path(__file__).parents[2] / "golden" / "tinysam.json"


def tiny_sam(dim=8):
    """At 64 pixels."""
    sizes = {"dims": (dim, dim, 2 * dim, 2 * dim), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}
    return SAM(64, TinyViT(**sizes, windows=(7, 7, 4, 3), width=32), width=32, hidden=32)


def recorded(name):
    """A group of the reference's numbers."""
    return json.loads(GOLDEN.read_text())[name]


def agrees(tensor, summary, tolerance=3e-4):
    """Whether a tensor is the one that a summary was made of."""
    assert list(tensor.shape) == summary["shape"]
    flat = tensor.detach().double().flatten()
    for want, places in ((summary["first8"], range(len(summary["first8"]))), (summary["at"], summary["idx"])):
        difference = (flat[list(places)] - torch.tensor(want, dtype=torch.float64)).abs().max().item()
        assert difference < tolerance, difference
    assert abs(flat.abs().sum().item() / summary["abs_sum"] - 1) < 1e-4
