"""A promptable segmenter for tests."""

from lightning_modules.tinysam.network import SAM, TinyViT


def tiny_sam(dim=8):
    """At 64 pixels."""
    sizes = {"dims": (dim, dim, 2 * dim, 2 * dim), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2)}
    return SAM(64, TinyViT(**sizes, windows=(7, 7, 4, 3), width=32), width=32, hidden=32)
