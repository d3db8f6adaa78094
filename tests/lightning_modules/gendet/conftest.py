"""Features without images: the spec's toy of reals on a plane and generators that each step off it in a
direction of their own.
"""

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.fake_images.module import FakeImagesDataModule
from datamodules.features import FeatureDataset


class Stub(nn.Module):
    """An encoder of features that are there already."""

    def __init__(self, width=48):
        super().__init__()
        self.width = width
        self.model = self.key = "stub"

    def forward(self, images):
        return images.flatten(1)[:, : self.width]


class Memory:
    """A store of features in memory."""

    def __init__(self, features):
        self.features = np.asarray(features, np.float32)
        self.width, self.views, self.dropped = self.features.shape[1], 1, []

    def __len__(self):
        return len(self.features)

    def read(self, rows, views):
        return self.features[rows]


class ToyData(FakeImagesDataModule):
    """Generator 0 is seen, the others are not; the loaders are the real ones."""

    def __init__(self, count=64, generators=3, width=48, seed=0, **options):
        super().__init__(**{"batch_size": 16, "num_workers": 0, "seed": 0, **options})
        self.count, self.width = count, width
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.plane = rng.normal(0, 1 / np.sqrt(8), (8, width))
        self.directions = np.linalg.qr(rng.normal(size=(width, width)))[0][:generators]
        self.generator_names = [f"toy{number}" for number in range(generators)]
        self.seen_generators = ["toy0"]
        self.root = "memory"
        self.sets = {split: self.made(split) for split in ("train", "val", "test")}

    def made(self, split):
        numbers = range(1 if split != "test" else len(self.directions))
        parts = [(number, label, self.drawn(number, label)) for number in numbers for label in (0, 1)]
        return FeatureDataset(
            [Memory(features) for _, _, features in parts],
            [label for _, label, _ in parts],
            [number for number, _, _ in parts],
        )

    def drawn(self, number, label):
        real = self.rng.normal(size=(self.count, 8)) @ self.plane
        real += 0.3 * self.rng.normal(size=real.shape)
        step = 2.5 * (1 + 0.2 * self.rng.normal(size=(self.count, 1)))
        return real + label * step * self.directions[number]

    def prepare_data(self):
        pass

    def setup(self, stage):
        self.datasets = dict(self.sets)


@pytest.fixture
def toy():
    return ToyData


@pytest.fixture
def stub():
    return Stub


@pytest.fixture
def fit(trainer):
    """Fit a detector on toy data; gives the trainer."""

    def call(module, data, epochs, **options):
        defaults = {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0, "max_epochs": epochs}
        run = trainer(**{**defaults, **options})
        run.fit(module, datamodule=data, ckpt_path=None)
        return run

    return call


@pytest.fixture
def snapshot():
    """The parameters of a network's parts, copied."""

    def take(network):
        return {
            name: torch.cat([p.detach().clone().flatten() for p in part.parameters()])
            for name, part in network.named_children()
        }

    return take
