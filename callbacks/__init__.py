"""Everything that plugs into a run: objectives, structure, reports and writers."""

from callbacks.checkpointing import AtomicCheckpointIO, RunCheckpoint
from callbacks.efficiency import EfficiencyReport
from callbacks.export import ONNXExport
from callbacks.objective import FeatureTaps, FrozenNetwork, ObjectiveCallback
from callbacks.prediction_writers import ClassificationWriter, PredictionWriter
from callbacks.preemption import Preemption
from callbacks.results import Results

__all__ = [
    "AtomicCheckpointIO",
    "ClassificationWriter",
    "EfficiencyReport",
    "FeatureTaps",
    "FrozenNetwork",
    "ONNXExport",
    "ObjectiveCallback",
    "PredictionWriter",
    "Preemption",
    "Results",
    "RunCheckpoint",
]
