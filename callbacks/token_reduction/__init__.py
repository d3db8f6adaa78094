"""Token reduction in timm's ViTs: PPT, and ToMe and EViT as its baselines."""

from callbacks.token_reduction.attach import attach_reducers, detach_reducers, record_tokens
from callbacks.token_reduction.base import TokenReduction
from callbacks.token_reduction.evit import EViT, KeepAttentive
from callbacks.token_reduction.macs import VitShape, smallest_r
from callbacks.token_reduction.ppt import PruneOrPool, TokenPruningPooling
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.tome import MergeSimilar, ToMe

patch, unpatch = attach_reducers, detach_reducers  # what users' scripts call them

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
    "attach_reducers",
    "detach_reducers",
    "patch",
    "record_tokens",
    "smallest_r",
    "unpatch",
]
