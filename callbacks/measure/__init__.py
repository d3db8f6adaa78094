"""What a network costs and how it behaves: reports that `Results` collects."""

from callbacks.measure.cka import CKAAnalysis
from callbacks.measure.efficiency import EfficiencyReport
from callbacks.measure.generator_report import GeneratorReport
from callbacks.measure.lm_eval import LMEvaluation
from callbacks.measure.stage_logger import StageLogger

__all__ = ["CKAAnalysis", "EfficiencyReport", "GeneratorReport", "LMEvaluation", "StageLogger"]
