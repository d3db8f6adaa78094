import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "rpg.json").read_text())


@pytest.fixture(scope="session")
def fill() -> Any:
    import importlib.util

    specification = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch) -> None:
    """Two plots take longer than a whole fit here; tests that want them ask for `drawing`."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr("callbacks.pruning.base.draw_run", lambda *_: None)


@pytest.fixture
def drawing() -> None:
    """Let the fit draw its pictures."""


class Pictures(Dataset):
    """Images (3, 8, 8) of four classes, one bright quadrant each."""

    def __init__(self, count: int = 64) -> None:
        stream = torch.Generator().manual_seed(1)
        self.labels = torch.arange(count) % 4
        self.images = torch.randn(count, 3, 8, 8, generator=stream)
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[:, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class PictureData(LightningDataModule):
    """The pictures in one order: all processes together see the batches that one process would."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        pictures = Pictures()
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = DistributedSampler(pictures, shuffle=False, **ranks)
        return DataLoader(pictures, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Pictures(16), batch_size=self.batch_size)


class TinyNet(LightningModule):
    """Two convolutions and a linear layer, without normalisation."""

    def __init__(self, optimizer: str = "sgd", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 4),
        )
        self.kind = optimizer
        self.steps_seen: list[dict[str, Tensor]] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        return torch.optim.AdamW(self.parameters(), lr=3e-3, amsgrad=True)


class ExactZeros(Callback):
    """After every step: masked weights and optimiser states are exactly zero, and counts what it checked."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning
        self.checked = 0
        self.densities: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        masks = self.pruning.masks
        self.densities.append(masks.density())
        for name, weight in self.pruning.weights.items():
            dead = ~masks[name]
            assert not weight[dead].any(), name
            for optimizer in trainer.optimizers:
                for key, state in optimizer.state.get(weight, {}).items():
                    if isinstance(state, Tensor) and state.shape == weight.shape:
                        assert not state[dead].any(), (name, key)
                        self.checked += 1


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """`train(module, callbacks, **trainer arguments)`: a fit on 64 pictures, batches of 8, on the CPU."""

    def run(
        module: LightningModule,
        callbacks: list[Callback],
        ckpt_path: str | Path | None = None,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> Trainer:
        arguments: dict[str, Any] = {
            "max_epochs": 5,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
        }
        trainer = Trainer(**{**arguments, **kwargs}, callbacks=callbacks)
        trainer.fit(module, datamodule=PictureData(batch_size), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


@pytest.fixture
def tiny() -> type[TinyNet]:
    return TinyNet


@pytest.fixture
def exact_zeros() -> type[ExactZeros]:
    return ExactZeros
