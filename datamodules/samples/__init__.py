"""Procedural data sets, written in the formats of the real ones: for quick starts, tests and
demonstrations.
"""

from datamodules.samples.cifar100 import write_cifar
from datamodules.samples.fake_images import write_fake_images
from datamodules.samples.imagenet import write_image_folders, write_pictures

__all__ = ["write_cifar", "write_fake_images", "write_image_folders", "write_pictures"]
