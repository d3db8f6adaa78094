"""CFAM: text-based person retrieval with ultra-fine captions (arXiv 2312.03441)."""

from lightning_modules.cfam.losses import hard_negatives, itc, local_similarity, sdm
from lightning_modules.cfam.module import CFAM
from lightning_modules.cfam.network import GranularityDecoder, IdentityHead, Matcher
from lightning_modules.cfam.objective import LossSettings
from lightning_modules.cfam.schedule import WarmupCosine
from lightning_modules.cfam.towers import ClipTowers

__all__ = [
    "CFAM",
    "ClipTowers",
    "GranularityDecoder",
    "IdentityHead",
    "LossSettings",
    "Matcher",
    "WarmupCosine",
    "hard_negatives",
    "itc",
    "local_similarity",
    "sdm",
]
