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
from callbacks.lm_eval import LMEvaluation
from callbacks.objective import FeatureTaps, FrozenNetwork, ObjectiveCallback
from callbacks.prediction_writers import ClassificationWriter, PredictionWriter
from callbacks.preemption import Preemption
from callbacks.pruning import MagnitudePruning, PruningCallback, RankPruning, RigL
from callbacks.quantization import CBQ, GPTQ, RTN, QuantizationCallback
from callbacks.results import Results
from callbacks.resuming import ExactResume
from callbacks.score_writer import ScoreWriter
from callbacks.stage_logger import StageLogger
from callbacks.text_writer import TextWriter
from callbacks.token_reduction import EViT, TokenPruningPooling, TokenReduction, ToMe

__all__ = [
    "BKD",
    "CBQ",
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "GPTQ",
    "KD",
    "OFA",
    "RKD",
    "RTN",
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
    "LMEvaluation",
    "MagnitudePruning",
    "ONNXExport",
    "ObjectiveCallback",
    "PredictionWriter",
    "Preemption",
    "PruningCallback",
    "QuantizationCallback",
    "RankPruning",
    "Results",
    "RigL",
    "RunCheckpoint",
    "ScoreWriter",
    "StageLogger",
    "TextWriter",
    "ToMe",
    "TokenPruningPooling",
    "TokenReduction",
]
