"""Everything that plugs into a run: objectives, structure, reports and writers."""

from callbacks.checkpointing import AtomicCheckpointIO, RunCheckpoint
from callbacks.cka import CKAAnalysis
from callbacks.distillation import (
    BKD,
    CC,
    CRD,
    DIST,
    DKD,
    KD,
    OFA,
    RKD,
    Criterion,
    DistillationTeacher,
    FitNet,
)
from callbacks.efficiency import EfficiencyReport
from callbacks.export import ONNXExport
from callbacks.objective import FeatureTaps, FrozenNetwork, ObjectiveCallback
from callbacks.prediction_writers import ClassificationWriter, PredictionWriter
from callbacks.preemption import Preemption
from callbacks.results import Results

__all__ = [
    "BKD",
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "OFA",
    "RKD",
    "AtomicCheckpointIO",
    "CKAAnalysis",
    "ClassificationWriter",
    "Criterion",
    "DistillationTeacher",
    "EfficiencyReport",
    "FeatureTaps",
    "FitNet",
    "FrozenNetwork",
    "ONNXExport",
    "ObjectiveCallback",
    "PredictionWriter",
    "Preemption",
    "Results",
    "RunCheckpoint",
]
