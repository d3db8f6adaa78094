"""DECO and DECO+ (arXiv 2312.13735): query-based detection with convolutions only."""

from lightning_modules.deco.deploy import deploy
from lightning_modules.deco.losses import FocalCriterion, SetCriterion, VarifocalCriterion
from lightning_modules.deco.module import DecoDetector
from lightning_modules.deco.network import Deco, DetectionNetwork
from lightning_modules.deco.plus import DecoPlus
from lightning_modules.deco.released import load_backbone, load_detector

__all__ = [
    "Deco",
    "DecoDetector",
    "DecoPlus",
    "DetectionNetwork",
    "FocalCriterion",
    "SetCriterion",
    "VarifocalCriterion",
    "deploy",
    "load_backbone",
    "load_detector",
]
