import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch._utils import ExceptionWrapper

from datamodules.base import DataModule
from datamodules.cifar100 import CIFAR100DataModule
from datamodules.imagenet import ImageFileDataset, ImageFolderDataModule
from datamodules.images import ImagesDataModule
from datamodules.reading import CorruptSampleError, SkipCounter, SkippingDataset, list_images, read_image
from datamodules.sampling import IdentitySampler
from datamodules.transforms import ImageTransforms

SMALL: dict[str, Any] = {
    "transforms": ImageTransforms(image_size=32, train_crop="pad"),
    "num_workers": 0,
    "batch_size": 20,
}


def with_damage(root: Path, *damaged: int) -> Path:
    """Ten pictures, some of which cannot be read."""
    root.mkdir()
    for number in range(10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / f"{number}.png")
    for number in damaged:
        path = root / f"{number}.png"
        path.write_bytes(path.read_bytes()[:40])
    return root


def pictures(root: Path, **options: Any) -> ImagesDataModule:
    transforms = ImageTransforms(image_size=8, crop_pct=1.0)
    data = ImagesDataModule(
        root=root, transforms=transforms, **{"num_workers": 0, "batch_size": 5, **options}
    )
    data.setup("predict")
    return data


def order(data: DataModule, epoch: int = 0) -> list[int]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [index for batch in loader for index in batch["index"].tolist()]


# seeds, sizes


def test_seed_is_that_of_the_run_unless_given(cifar_root, monkeypatch):
    def with_seed(seed: int | None) -> list[int]:
        data = CIFAR100DataModule(root=cifar_root, seed=seed, **SMALL)
        data.setup("fit")
        return order(data)

    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert with_seed(None) == with_seed(11) != with_seed(12)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert with_seed(None) == with_seed(0)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [25, 25]), (False, [25, 25, 10])])
def test_drop_last(cifar_root, drop_last, sizes):
    data = CIFAR100DataModule(root=cifar_root, drop_last=drop_last, **{**SMALL, "batch_size": 25})
    data.setup("fit")
    assert [len(batch["label"]) for batch in data.train_dataloader()] == sizes


def test_eval_batch_size(cifar_root):
    data = CIFAR100DataModule(root=cifar_root, eval_batch_size=10, **SMALL)
    data.setup("test")
    assert [len(batch["label"]) for batch in data.test_dataloader()] == [10, 5]


def test_repeats_are_augmented_differently(cifar_root):
    data = CIFAR100DataModule(root=cifar_root, repeats=3, seed=0, **SMALL)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["index"][0] == batch["index"][1] == batch["index"][2] != batch["index"][3]
    assert not torch.equal(batch["image"][0], batch["image"][1])
    assert len(batch["index"].unique()) == 7


def test_evaluation_does_not_change_with_the_epoch(cifar_root):
    data = CIFAR100DataModule(root=cifar_root, **SMALL)
    data.setup("test")
    loader = data.test_dataloader()
    first = next(iter(loader))
    loader.sampler.set_epoch(4)
    assert torch.equal(first["image"], next(iter(loader))["image"])


# options that make no sense


def test_refuses_options():
    with pytest.raises(MisconfigurationException, match="ImageFolderDataModule has no download"):
        ImageFolderDataModule(download=True)
    with pytest.raises(MisconfigurationException, match="DataModule has no sample"):
        DataModule(sample=True)
    with pytest.raises(ValueError, match=r"data.init_args.batch_size: must be positive, got 0"):
        CIFAR100DataModule(batch_size=0)
    with pytest.raises(ValueError, match="sample_classes"):
        CIFAR100DataModule(sample_classes=101)


def test_split_that_is_not_there(cifar_root):
    data = ImageFolderDataModule(root=cifar_root)
    with pytest.raises(MisconfigurationException, match="no predict data"):
        data.predict_dataloader()


# unreadable files


def test_damaged_image_is_named(tmp_path):
    root = with_damage(tmp_path / "x", 7)
    with pytest.raises(CorruptSampleError, match=rf"cannot read the image {root}/7.png \(.*Error: .+\)"):
        read_image(root / "7.png")
    with pytest.raises(CorruptSampleError, match=r"7\.png"):
        list(pictures(root).predict_dataloader())


def test_damage_found_by_a_worker_is_named(tmp_path):
    """A worker's exception is made anew in the training process, from its message."""
    root = with_damage(tmp_path / "x", 7)
    try:
        read_image(root / "7.png")
    except CorruptSampleError:
        sent = pickle.loads(pickle.dumps(ExceptionWrapper(where="in DataLoader worker process 0")))
    with pytest.raises(CorruptSampleError, match=r"7\.png"):
        sent.reraise()


def test_missing_image_is_named(tmp_path):
    data = pictures(with_damage(tmp_path / "x"))
    (tmp_path / "x/3.png").unlink()
    with pytest.raises(CorruptSampleError, match=r"x/3\.png \(FileNotFoundError"):
        list(data.predict_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_and_counted(tmp_path, caplog, workers):
    data = pictures(with_damage(tmp_path / "x", 2, 3, 9), on_error="skip", num_workers=workers)
    loader = data.predict_dataloader()
    with caplog.at_level(logging.WARNING):
        seen = [index for batch in loader for index in batch["index"].tolist()]
    assert seen == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    said = [record.getMessage() for record in caplog.records]
    assert (
        said[-1]
        == "ImagesDataModule, predict: 3 unreadable samples were replaced by others (on_error: skip)."
    )
    assert loader.dataset.dataset.counter._counts.tolist() == ([3] if workers == 0 else [2, 1])
    if workers == 0:
        assert [line for line in said if "2.png" in line]


def test_each_epoch_reports_its_own_count(tmp_path, caplog):
    loader = pictures(with_damage(tmp_path / "x", 2), on_error="skip").predict_dataloader()
    for _ in range(2):
        list(loader)
    assert [
        record.getMessage().count("1 unreadable")
        for record in caplog.records
        if "replaced" in record.getMessage()
    ] == [1, 1]


def test_nothing_is_said_when_all_is_well(tmp_path, caplog):
    list(pictures(with_damage(tmp_path / "x"), on_error="skip").predict_dataloader())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_nothing_readable(tmp_path):
    data = pictures(with_damage(tmp_path / "x", *range(10)), on_error="skip")
    with pytest.raises(CorruptSampleError, match="not one of the 10 samples"):
        list(data.predict_dataloader())


def test_other_errors_are_not_swallowed():
    class Broken:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> None:
            raise KeyError(index)

    with pytest.raises(KeyError):
        SkippingDataset(Broken(), SkipCounter(0))[0]  # type: ignore[arg-type]


# ranks


def ranked(data: DataModule, strategy: str, world: int) -> list[list[int]]:
    """What each rank evaluates, as a strategy of that name would have it."""
    seen = []
    for rank in range(world):
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            strategy=type(strategy, (), {})(),
            distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
        )
        seen.append([index for batch in data.test_dataloader() for index in batch["index"].tolist()])
    return seen


def test_evaluation_on_many_ranks_has_no_duplicates(cifar_root, caplog):
    data = CIFAR100DataModule(root=cifar_root, **SMALL)
    data.setup("test")
    seen = ranked(data, "DDPStrategy", 4)
    assert [len(part) for part in seen] == [4, 4, 4, 3]
    assert sorted(index for part in seen for index in part) == list(range(15))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_need_equal_batches_and_say_so(cifar_root, caplog, strategy):
    data = CIFAR100DataModule(root=cifar_root, **SMALL)
    data.setup("test")
    seen = ranked(data, strategy, 4)
    assert [len(part) for part in seen] == [4, 4, 4, 4]
    assert (
        f"1 places in the test batches are filled with repeated samples, as all 4 ranks of {strategy}"
        in caplog.text
    )


# the Trainer


class Retrieval(ImagesDataModule):
    """A test of a gallery and of queries, in one folder each."""

    def parts(self, split):
        return ("gallery", "query") if split == "test" else super().parts(split)

    def setup(self, stage):
        for part in ("gallery", "query"):
            names = list_images(self.root / part).names
            self.datasets[part] = ImageFileDataset(self.root / part, names, with_path=True)


def test_a_split_may_have_several_loaders(tmp_path):
    for part, count in (("gallery", 7), ("query", 3)):
        for number in range(count):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / f"{number}.png")
    seen: list[tuple[int, str]] = []

    class Module(LightningModule):
        def test_step(self, batch, batch_idx, dataloader_idx):
            seen.extend((dataloader_idx, Path(path).parent.name) for path in batch["path"])

    data = Retrieval(root=tmp_path, transforms=ImageTransforms(image_size=8), num_workers=0, batch_size=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.test(Module(), datamodule=data, verbose=False)
    assert seen == [(0, "gallery")] * 7 + [(1, "query")] * 3
    assert list(data.test_dataloader()) == ["gallery", "query"]
    del data.datasets["query"]
    with pytest.raises(MisconfigurationException, match="Retrieval has no query data"):
        data.test_dataloader()


def test_a_family_may_have_an_order_of_its_own(cifar_root):
    class Pairs(CIFAR100DataModule):
        def sampler(self, dataset, split):
            if split != "train":
                return super().sampler(dataset, split)
            rank, world = self._ranks()
            labels = self.datasets["train"].labels
            return IdentitySampler(labels, 2, 10, seed=self.run_seed, rank=rank, num_replicas=world)

    data = Pairs(root=cifar_root, **SMALL)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert sorted(np.unique(batch["label"], return_counts=True)[1].tolist()) == [10, 10]


class Indices(LightningModule):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"index": batch["index"], "path": batch["path"]}


def test_trainer_predicts_all(tmp_path):
    """Lightning rebuilds the loader for predictions; the last, smaller batch is there, and the paths."""
    data = pictures(with_damage(tmp_path / "x"), batch_size=4, on_error="skip")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    outputs = trainer.predict(Indices(), datamodule=data)
    assert outputs is not None
    assert [output["index"].tolist() for output in outputs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]  # type: ignore[index]
    assert outputs[2]["path"] == [str(tmp_path / "x/8.png"), str(tmp_path / "x/9.png")]  # type: ignore[index]
