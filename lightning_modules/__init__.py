"""One room a method: networks, losses and the LightningModules that train them."""

from lightning_modules.base import Method
from lightning_modules.cfam import CFAM, WarmupCosine
from lightning_modules.classification import ImageClassifier
from lightning_modules.deco import Deco, DecoDetector, DecoPlus, FocalCriterion, VarifocalCriterion
from lightning_modules.gendet import (
    CNNDetector,
    FakeDetector,
    GenDet,
    ImageEncoder,
    LinearProbe,
    NearestNeighbors,
    StageSchedule,
)
from lightning_modules.language_model import CausalLanguageModel
from lightning_modules.parts import students  # noqa: F401  (registers swin_nano and swin_pico with timm)
from lightning_modules.parts.schedules import WarmupSchedule

__all__ = [
    "CFAM",
    "CNNDetector",
    "CausalLanguageModel",
    "Deco",
    "DecoDetector",
    "DecoPlus",
    "FakeDetector",
    "FocalCriterion",
    "GenDet",
    "ImageClassifier",
    "ImageEncoder",
    "LinearProbe",
    "Method",
    "NearestNeighbors",
    "StageSchedule",
    "VarifocalCriterion",
    "WarmupCosine",
    "WarmupSchedule",
]
