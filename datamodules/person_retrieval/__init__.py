"""Pictures of people and sentences about them, in the layouts that are published."""

from datamodules.person_retrieval.captions import CaptionTokenizer
from datamodules.person_retrieval.module import PersonRetrievalDataModule

__all__ = ["CaptionTokenizer", "PersonRetrievalDataModule"]
