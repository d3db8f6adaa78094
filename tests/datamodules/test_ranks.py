"""Two real processes: what they read together is what one process reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import distributed, nn
from torch.multiprocessing import start_processes

from datamodules.cifar100 import CIFAR100DataModule
from datamodules.loading import EpochSampler, ResumableLoader, SeededDataset
from datamodules.transforms import ImageTransforms

WORLD = 2


def data_module(root: Path, batch_size: int) -> CIFAR100DataModule:
    transforms = ImageTransforms(image_size=32, train_crop="pad")
    return CIFAR100DataModule(
        root=root, transforms=transforms, batch_size=batch_size, eval_batch_size=1, num_workers=0, seed=4
    )


def _gloo(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    data = SeededDataset(range(21))  # type: ignore[arg-type]
    train = ResumableLoader(data, batch_size=3, sampler=EpochSampler(data, seed=1), drop_last=True)
    evaluation = ResumableLoader(data, batch_size=4, sampler=EpochSampler(data, shuffle=False, tail="keep"))
    torch.save(
        [[batch.tolist() for batch in loader] for loader in (train, evaluation)], folder / f"{rank}.pt"
    )
    distributed.destroy_process_group()


def test_ranks_of_torch_distributed(tmp_path):
    start_processes(_gloo, (tmp_path,), nprocs=WORLD, start_method="fork")
    (first_train, first_eval), (second_train, second_eval) = (
        torch.load(tmp_path / f"{r}.pt") for r in range(WORLD)
    )
    data = SeededDataset(range(21))  # type: ignore[arg-type]
    single = ResumableLoader(data, batch_size=6, sampler=EpochSampler(data, seed=1), drop_last=True)
    whole = [sorted(batch.tolist()) for batch in single]
    together = [sorted(a + b) for a, b in zip(first_train, second_train, strict=True)]
    assert together == whole
    evaluated = [index for batch in first_eval + second_eval for index in batch]
    assert sorted(evaluated) == list(range(21))


class Writer(LightningModule):
    """Batch normalisation, so that DDP has buffers to keep equal; it writes down what its rank saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
        self.network(torch.zeros(2, 3, 32, 32))
        self.folder = folder
        self.seen: list[tuple[str, int, list[int], float]] = []

    def note(self, kind: str, batch: dict[str, Any]) -> None:
        checksum = batch["image"].double().sum().item()
        self.seen.append((kind, self.current_epoch, batch["index"].tolist(), checksum))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.note("train", batch)
        return nn.functional.cross_entropy(self.network(batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.note("val", batch)
        self.log("mean", self.network(batch["image"]).mean(), sync_dist=True)

    def on_fit_end(self) -> None:
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def _fit(folder: Path, data: CIFAR100DataModule, **options: Any) -> None:
    folder.mkdir()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(Writer(folder), data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_ranks_of_lightning(cifar_root, tmp_path):
    """The global batches are those of one process; each validation image is seen once, though one rank has
    more.
    """
    _fit(tmp_path / "one", data_module(cifar_root, 8), devices=1)
    _fit(tmp_path / "two", data_module(cifar_root, 4), devices=WORLD, strategy="ddp_fork")
    single = torch.load(tmp_path / "one/0.pt")
    ranks = [torch.load(tmp_path / f"two/{rank}.pt") for rank in range(WORLD)]

    def part(seen: list[Any], kind: str) -> list[Any]:
        return [entry for entry in seen if entry[0] == kind]

    pairs = zip(part(ranks[0], "train"), part(ranks[1], "train"), strict=True)
    for (_, epoch, first, a), (_, _, second, b), (_, wanted_epoch, whole, c) in (
        (*pair, one) for pair, one in zip(pairs, part(single, "train"), strict=True)
    ):
        assert epoch == wanted_epoch
        assert sorted(first + second) == sorted(whole)
        assert a + b == pytest.approx(c, rel=1e-9)

    last = [[entry[2] for entry in part(seen, "val") if entry[1] == 1] for seen in ranks]
    assert [len(batches) for batches in last] == [8, 7]
    assert sorted(index for batches in last for (index,) in batches) == list(range(15))
