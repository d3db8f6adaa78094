"""Drawn pedestrians, their data module, and a CLIP that is small enough to train in a test."""

from functools import partial

import pytest
import torch

from datamodules import PersonRetrievalDataModule
from datamodules.person_retrieval import PersonTransforms
from datamodules.samples.pedestrians import write_pedestrians
from lightning_modules.cfam import CFAM, LossSettings

TINY = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16},
    "text_cfg": {"vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """A data set of sixteen identities, four of them to test on, with three pictures each."""
    root = tmp_path_factory.mktemp("people")
    write_pedestrians(root, 16)
    return root


@pytest.fixture
def pedestrians(people):
    """A factory of data modules over `people`."""

    def make(**options):
        defaults = {
            "root": people,
            "context_length": 40,
            "transforms": PersonTransforms((48, 16)),
            "val_source": "test",
            "batch_size": 8,
            "num_workers": 0,
            "seed": 0,
        }
        return PersonRetrievalDataModule(**{**defaults, **options})

    return make


@pytest.fixture
def make_cfam():
    """A factory of tiny modules, always from the same random weights."""

    def make(settings=LossSettings(temperature=0.07), **options):
        torch.manual_seed(0)
        optimizer = partial(torch.optim.SGD, lr=0.02)
        defaults = {"optimizer": optimizer, "lr_multipliers": {}, "num_queries": 4, "num_classes": 12}
        size = {"image_size": (48, 16), "context_length": 40}
        return CFAM(TINY, None, settings=settings, **{**defaults, **size, **options})

    return make
