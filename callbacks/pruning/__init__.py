"""Pruning over a run: gradual magnitude pruning, RPG and RigL, and the pieces that they are made of."""

from callbacks.pruning.base import PruningCallback
from callbacks.pruning.magnitude import MagnitudePruning
from callbacks.pruning.masks import MaskBook
from callbacks.pruning.rank import RankPruning
from callbacks.pruning.rank_loss import rank_loss
from callbacks.pruning.rank_sweep import RankSweep
from callbacks.pruning.rigl import RigL

__all__ = [
    "MagnitudePruning",
    "MaskBook",
    "PruningCallback",
    "RankPruning",
    "RankSweep",
    "RigL",
    "rank_loss",
]
