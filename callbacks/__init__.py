"""Everything that plugs into a run: objectives, structure, reports and writers."""

from callbacks.checkpointing import AtomicCheckpointIO, RunCheckpoint
from callbacks.cka import CKAAnalysis
from callbacks.detection_teacher import DetectionTeacher
from callbacks.detection_writer import DetectionWriter
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
from callbacks.generator_report import GeneratorReport
from callbacks.objective import FeatureTaps, FrozenNetwork, ObjectiveCallback
from callbacks.prediction_writers import ClassificationWriter, PredictionWriter
from callbacks.preemption import Preemption
from callbacks.pruning import MagnitudePruning, PruningCallback, RankPruning, RigL
from callbacks.results import Results
from callbacks.resuming import ExactResume
from callbacks.score_writer import ScoreWriter
from callbacks.stage_logger import StageLogger
from callbacks.token_reduction import EViT, TokenPruningPooling, TokenReduction, ToMe

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
    "DetectionTeacher",
    "DetectionWriter",
    "DistillationTeacher",
    "EViT",
    "EfficiencyReport",
    "ExactResume",
    "FeatureTaps",
    "FitNet",
    "FrozenNetwork",
    "GeneratorReport",
    "MagnitudePruning",
    "ONNXExport",
    "ObjectiveCallback",
    "PredictionWriter",
    "Preemption",
    "PruningCallback",
    "RankPruning",
    "Results",
    "RigL",
    "RunCheckpoint",
    "ScoreWriter",
    "StageLogger",
    "ToMe",
    "TokenPruningPooling",
    "TokenReduction",
]
