"""Data sets as Lightning DataModules, each in the layout that is really published."""

from datamodules.base import DataModule, TransformImage, VisionDataModule
from datamodules.cifar100 import CIFAR100DataModule
from datamodules.coco.module import CocoDataModule
from datamodules.coco.transforms import DecoPlusTransforms, DecoTransforms, DetectionTransforms
from datamodules.coco.yolo import YoloDataModule
from datamodules.fake_images.module import FakeImagesDataModule
from datamodules.fake_images.transforms import Degradation, FakeImageTransforms
from datamodules.glue import CorpusToTask, EntityDataModule, GlueDataModule
from datamodules.image_text import ImageTextDataModule, RetrievalSet, ZeroShotSet
from datamodules.imagenet import ImageFolderDataModule, ImageNetDataModule
from datamodules.images import ImagesDataModule
from datamodules.loading import EpochSampler, ResumableLoader, SeededDataset, hash_seed
from datamodules.person_retrieval import CaptionTokenizer, PersonRetrievalDataModule
from datamodules.reading import CorruptSampleError, read_image
from datamodules.sa1b import InstancePromptsDataModule, SA1BDataModule
from datamodules.sampling import IdentitySampler
from datamodules.text.module import TextDataModule
from datamodules.transforms import PINNED, ImageTransforms

__all__ = [
    "PINNED",
    "CIFAR100DataModule",
    "CaptionTokenizer",
    "CocoDataModule",
    "CorpusToTask",
    "CorruptSampleError",
    "DataModule",
    "DecoPlusTransforms",
    "DecoTransforms",
    "Degradation",
    "DetectionTransforms",
    "EntityDataModule",
    "EpochSampler",
    "FakeImageTransforms",
    "FakeImagesDataModule",
    "GlueDataModule",
    "IdentitySampler",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "ImageTextDataModule",
    "ImageTransforms",
    "ImagesDataModule",
    "InstancePromptsDataModule",
    "PersonRetrievalDataModule",
    "ResumableLoader",
    "RetrievalSet",
    "SA1BDataModule",
    "SeededDataset",
    "TextDataModule",
    "TransformImage",
    "VisionDataModule",
    "YoloDataModule",
    "ZeroShotSet",
    "hash_seed",
    "read_image",
]
