"""Text tasks: GLUE, named entities, and a general corpus to distil them with."""

from datamodules.glue.conll import read_conll
from datamodules.glue.corpus import CorpusToTask
from datamodules.glue.module import EntityDataModule, GlueDataModule
from datamodules.glue.tasks import TASKS

__all__ = ["TASKS", "CorpusToTask", "EntityDataModule", "GlueDataModule", "read_conll"]
