"""DFKD-T3-style data-free distillation of language models by text-to-text transfer (arXiv 2311.01689)."""

from lightning_modules.dfkd_t3.bridge import Relaxation, SoftTokenBridge, WrittenText, embed_tokens
from lightning_modules.dfkd_t3.generator import SpecialTokens, TextGenerator
from lightning_modules.dfkd_t3.module import DataFreeDistillation
from lightning_modules.dfkd_t3.objective import GeneratorObjective, Weights
from lightning_modules.dfkd_t3.options import Mode, Schedule, TextModel
from lightning_modules.dfkd_t3.reader import TextReader

__all__ = [
    "DataFreeDistillation",
    "GeneratorObjective",
    "Mode",
    "Relaxation",
    "Schedule",
    "SoftTokenBridge",
    "SpecialTokens",
    "TextGenerator",
    "TextModel",
    "TextReader",
    "Weights",
    "WrittenText",
    "embed_tokens",
]
