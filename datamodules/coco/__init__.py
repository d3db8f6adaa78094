"""Detection data in COCO's layout."""

from datamodules.coco.module import CocoDataModule
from datamodules.coco.transforms import DecoPlusTransforms, DecoTransforms, DetectionTransforms

__all__ = ["CocoDataModule", "DecoPlusTransforms", "DecoTransforms", "DetectionTransforms"]
