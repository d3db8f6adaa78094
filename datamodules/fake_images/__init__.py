"""Real and generated images by generator, in the published layouts."""

from datamodules.fake_images.module import FakeImagesDataModule
from datamodules.fake_images.transforms import Degradation, FakeImageTransforms

__all__ = ["Degradation", "FakeImageTransforms", "FakeImagesDataModule"]
