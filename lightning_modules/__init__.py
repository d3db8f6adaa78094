"""One room a method: networks, losses and the LightningModules that train them."""

from lightning_modules.base import Method
from lightning_modules.cfam import CFAM, WarmupCosine
from lightning_modules.classification import ImageClassifier
from lightning_modules.deco import Deco, DecoDetector, DecoPlus, FocalCriterion, VarifocalCriterion
from lightning_modules.dfkd_t3 import (
    DataFreeDistillation,
    GeneratorObjective,
    Relaxation,
    Schedule,
    TextModel,
)
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
from lightning_modules.lightclip import LightCLIP
from lightning_modules.parts import students  # noqa: F401  (registers swin_nano and swin_pico with timm)
from lightning_modules.parts.schedules import WarmupSchedule
from lightning_modules.text_classifier import TextClassifier
from lightning_modules.tinysam import TinySAMModule

__all__ = [
    "CFAM",
    "CNNDetector",
    "CausalLanguageModel",
    "DataFreeDistillation",
    "Deco",
    "DecoDetector",
    "DecoPlus",
    "FakeDetector",
    "FocalCriterion",
    "GenDet",
    "GeneratorObjective",
    "ImageClassifier",
    "ImageEncoder",
    "LightCLIP",
    "LinearProbe",
    "Method",
    "NearestNeighbors",
    "Relaxation",
    "Schedule",
    "StageSchedule",
    "TextClassifier",
    "TextModel",
    "TinySAMModule",
    "VarifocalCriterion",
    "WarmupCosine",
    "WarmupSchedule",
]
