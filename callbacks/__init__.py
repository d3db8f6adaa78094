"""Everything that plugs into a run: objectives, structure, reports and writers."""

from callbacks.deploy.clip import CLIPExport
from callbacks.deploy.onnx import ONNXExport
from callbacks.deploy.runtime import RuntimeTest
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
    Teacher,
)
from callbacks.distillation.clip import CLIPTeacher
from callbacks.distillation.detection import DetectionTeacher
from callbacks.distillation.sam import SAMTeacher
from callbacks.distillation.text import DataFreeTeacher, TextTeacher
from callbacks.measure.cka import CKAAnalysis
from callbacks.measure.efficiency import EfficiencyReport
from callbacks.measure.generator_report import GeneratorReport
from callbacks.measure.lm_eval import LMEvaluation
from callbacks.measure.stage_logger import StageLogger
from callbacks.objective import ObjectiveCallback
from callbacks.pruning import MagnitudePruning, PruningCallback, RankPruning, RigL
from callbacks.quantization import CBQ, GPTQ, RTN, HessianPTQ, QuantizationCallback
from callbacks.run.checkpointing import AtomicCheckpointIO, RunCheckpoint
from callbacks.run.lock import RunLock
from callbacks.run.log_lines import LogLines
from callbacks.run.preemption import Preemption
from callbacks.run.results import Results
from callbacks.run.resuming import ExactResume
from callbacks.token_reduction import EViT, TokenPruningPooling, TokenReduction, ToMe
from callbacks.writers.base import PredictionWriter
from callbacks.writers.classification import ClassificationWriter
from callbacks.writers.detection import DetectionWriter
from callbacks.writers.generated import GeneratedTextWriter
from callbacks.writers.masks import MaskWriter
from callbacks.writers.retrieval import RetrievalWriter
from callbacks.writers.scores import ScoreWriter
from callbacks.writers.submission import SubmissionWriter
from callbacks.writers.text import TextWriter
from lightning_modules.parts.frozen import FrozenNetwork
from lightning_modules.parts.taps import FeatureTaps

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
    "CLIPExport",
    "CLIPTeacher",
    "ClassificationWriter",
    "Criterion",
    "DataFreeTeacher",
    "DetectionTeacher",
    "DetectionWriter",
    "DistillationTeacher",
    "EViT",
    "EfficiencyReport",
    "ExactResume",
    "FeatureTaps",
    "FitNet",
    "FrozenNetwork",
    "GeneratedTextWriter",
    "GeneratorReport",
    "HessianPTQ",
    "LMEvaluation",
    "LogLines",
    "MagnitudePruning",
    "MaskWriter",
    "ONNXExport",
    "ObjectiveCallback",
    "PredictionWriter",
    "Preemption",
    "PruningCallback",
    "QuantizationCallback",
    "RankPruning",
    "Results",
    "RetrievalWriter",
    "RigL",
    "RunCheckpoint",
    "RunLock",
    "RuntimeTest",
    "SAMTeacher",
    "ScoreWriter",
    "StageLogger",
    "SubmissionWriter",
    "Teacher",
    "TextTeacher",
    "TextWriter",
    "ToMe",
    "TokenPruningPooling",
    "TokenReduction",
]
