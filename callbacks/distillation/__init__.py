"""Distillation: `Teacher` and its children, and a criterion class for each method."""

from callbacks.distillation.base import FrozenTeacher, Teacher
from callbacks.distillation.crd import CRD
from callbacks.distillation.criterion import Criterion
from callbacks.distillation.fitnet import FitNet
from callbacks.distillation.logits import BKD, DIST, DKD, KD
from callbacks.distillation.ofa import OFA
from callbacks.distillation.relations import CC, RKD
from callbacks.distillation.teacher import DistillationTeacher

__all__ = [
    "BKD",
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "OFA",
    "RKD",
    "Criterion",
    "DistillationTeacher",
    "FitNet",
    "FrozenTeacher",
    "Teacher",
]
