"""Predictions that a person and a program can read."""

from callbacks.writers.base import PredictionWriter
from callbacks.writers.classification import ClassificationWriter
from callbacks.writers.detection import DetectionWriter
from callbacks.writers.masks import MaskWriter
from callbacks.writers.retrieval import RetrievalWriter
from callbacks.writers.scores import ScoreWriter
from callbacks.writers.text import TextWriter

__all__ = [
    "ClassificationWriter",
    "DetectionWriter",
    "MaskWriter",
    "PredictionWriter",
    "RetrievalWriter",
    "ScoreWriter",
    "TextWriter",
]
