"""Image-text pairs to train on, and what models of them are evaluated on."""

from datamodules.image_text.evaluation import RetrievalSet, ZeroShotSet
from datamodules.image_text.module import ImageTextDataModule

__all__ = ["ImageTextDataModule", "RetrievalSet", "ZeroShotSet"]
