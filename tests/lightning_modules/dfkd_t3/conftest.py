"""A tiny language with a teacher of it, written once for all tests of this folder."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from callbacks import DataFreeTeacher
from datamodules import CorpusToTask, GlueDataModule
from datamodules.samples.sentiment import write_sentiment
from lightning_modules import DataFreeDistillation, Relaxation, Schedule, TextClassifier, TextModel

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """Folder of the sample."""
    root = tmp_path_factory.mktemp("sentiment") / "data"
    write_sentiment(root, 64)
    return root


@pytest.fixture(scope="session")
def teacher(language, tmp_path_factory):
    """A checkpoint of a `TextClassifier` with random, confident weights."""
    torch.manual_seed(3)
    module = TextClassifier("bert", model_args=BERT, tokenizer=str(language / "tokenizer"))
    nn.init.normal_(module.network.classifier.weight)
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path


@pytest.fixture
def distillation(language):
    """A factory of tiny modules: `t5` says whether generator and decoding are T5's."""

    def make(t5=False, relaxation=None, schedule=None, **options) -> LightningModule:
        torch.manual_seed(1)
        student = TextModel("bert", BERT)
        generator = TextModel("t5", T5) if t5 else TextModel("bert", BERT)
        decoding = "autoregressive" if t5 else "parallel"
        defaults = {
            "tokenizer": str(language / "tokenizer"),
            "relaxation": relaxation or Relaxation(decoding=decoding),
            "schedule": schedule or Schedule(steps=3),
            "length": 6,
            "generator_lr": 1e-2,
            "student_lr": 1e-2,
        }
        return DataFreeDistillation(student, generator, **{**defaults, **options})

    return make


@pytest.fixture
def data(language):
    """A factory of the sample's data module."""

    def make(**options):
        task = GlueDataModule(root=language, max_length=16, num_workers=0, batch_size=16)
        defaults = {"root": language, "length": 12, "batch_size": 8, "eval_batch_size": 16, "num_workers": 0}
        return CorpusToTask(task=task, **{**defaults, **options})

    return make


@pytest.fixture
def fitted(trainer, teacher):
    """Fit a module with its teacher; gives the trainer."""

    def fit(module, datamodule, resume=None, **options):
        defaults = {"max_epochs": -1, "limit_val_batches": 0, "callbacks": [DataFreeTeacher(weights=teacher)]}
        run = trainer(**{**defaults, **options})
        run.fit(module, datamodule=datamodule, ckpt_path=resume)
        return run

    return fit
