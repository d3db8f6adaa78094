"""Token reduction in timm's ViTs: PPT, and ToMe and EViT as its baselines."""

from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.evit import EViT
from callbacks.token_reduction.keep_attentive import KeepAttentive
from callbacks.token_reduction.macs import VitShape, smallest_r
from callbacks.token_reduction.merge_similar import MergeSimilar
from callbacks.token_reduction.patch import patch, record_tokens, unpatch
from callbacks.token_reduction.ppt import TokenPruningPooling
from callbacks.token_reduction.prune_or_pool import PruneOrPool
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.tome import ToMe

__all__ = [
    "EViT",
    "KeepAttentive",
    "MergeSimilar",
    "PruneOrPool",
    "Reducer",
    "ToMe",
    "TokenPruningPooling",
    "TokenReduction",
    "VitShape",
    "patch",
    "record_tokens",
    "smallest_r",
    "unpatch",
]
