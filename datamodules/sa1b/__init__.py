"""SA-1B, and masks of COCO and LVIS to evaluate prompts on."""

from datamodules.sa1b.instances import InstancePromptsDataModule
from datamodules.sa1b.module import SA1BDataModule

__all__ = ["InstancePromptsDataModule", "SA1BDataModule"]
