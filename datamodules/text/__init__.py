"""Text corpora as segments of tokens."""

from datamodules.text.module import TextDataModule

__all__ = ["TextDataModule"]
