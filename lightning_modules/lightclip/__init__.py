"""LightCLIP (arXiv 2312.00674): CLIP with light towers, trained by interaction at three levels."""

from lightning_modules.lightclip.losses import Softening
from lightning_modules.lightclip.matching import Matching
from lightning_modules.lightclip.module import LightCLIP
from lightning_modules.lightclip.network import LightCLIPNet

__all__ = ["LightCLIP", "LightCLIPNet", "Matching", "Softening"]
