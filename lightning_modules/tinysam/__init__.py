"""TinySAM (arXiv 2312.13789): a promptable segmenter distilled from SAM."""

from lightning_modules.tinysam.everything import Everything
from lightning_modules.tinysam.module import HardPrompts, TinySAMModule
from lightning_modules.tinysam.network import SAM, TinyViT
from lightning_modules.tinysam.protocols import Protocol

__all__ = ["SAM", "Everything", "HardPrompts", "Protocol", "TinySAMModule", "TinyViT"]
