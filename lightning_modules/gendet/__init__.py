"""GenDet (arXiv 2312.08880) and its baselines: detecting generated images of unseen generators."""

from lightning_modules.gendet.baselines import CNNDetector, LinearProbe, NearestNeighbors
from lightning_modules.gendet.detector import FakeDetector
from lightning_modules.gendet.module import GenDet
from lightning_modules.gendet.network import GenDetNet
from lightning_modules.gendet.schedule import StageSchedule
from lightning_modules.parts.encoder import ImageEncoder

__all__ = [
    "CNNDetector",
    "FakeDetector",
    "GenDet",
    "GenDetNet",
    "ImageEncoder",
    "LinearProbe",
    "NearestNeighbors",
    "StageSchedule",
]
