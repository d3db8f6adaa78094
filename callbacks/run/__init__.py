"""What every run has: a directory, checkpoints, an exact resume, a good end, a log and a report."""

from callbacks.run.checkpointing import AtomicCheckpointIO, RunCheckpoint
from callbacks.run.curves import LearningRates, LogInterval
from callbacks.run.lock import RunLock
from callbacks.run.log_lines import EpochLines, LogLines
from callbacks.run.preemption import Preemption
from callbacks.run.results import Results
from callbacks.run.resuming import ExactResume
from callbacks.run.summary import RunSummary

__all__ = [
    "AtomicCheckpointIO",
    "EpochLines",
    "ExactResume",
    "LearningRates",
    "LogInterval",
    "LogLines",
    "Preemption",
    "Results",
    "RunCheckpoint",
    "RunLock",
    "RunSummary",
]
