import pytest
import torch

from datamodules import SA1BDataModule
from datamodules.samples.sa1b import write_sa1b
from lightning_modules import TinySAMModule
from tests.lightning_modules.tinysam.tiny import tiny_sam


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Sixteen drawn scenes in two tars."""
    root = tmp_path_factory.mktemp("sa1b") / "tars"
    write_sa1b(root, size=16, image_size=48)
    return root


@pytest.fixture
def data(scenes):
    """A factory of their data module."""

    def make(**options):
        defaults = {
            "image_size": 64,
            "masks_per_image": 3,
            "val_fraction": 0.2,
            "batch_size": 2,
            "num_workers": 0,
        }
        return SA1BDataModule(root=scenes, **{**defaults, **options})

    return make


@pytest.fixture
def batch(data):
    """One of its training batches."""
    made = data()
    made.setup("fit")
    return next(iter(made.train_dataloader()))


@pytest.fixture
def student():
    """A factory of a method with a small network."""

    def make(seed=1, **options):
        torch.manual_seed(seed)
        return TinySAMModule(tiny_sam(8), **options)

    return make
