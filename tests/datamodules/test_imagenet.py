import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.imagenet import ImageFileDataset, ImageFolderDataModule, ImageNetDataModule
from datamodules.transforms import ImageTransforms

SMALL = {"transforms": ImageTransforms(image_size=16), "num_workers": 0, "batch_size": 4}


def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_labels_are_sorted_folders(folder_root):
    data = ImageFolderDataModule(root=folder_root, **SMALL)
    assert data.class_names == sorted(path.name for path in (folder_root / "train").iterdir())
    data.setup("fit")
    dataset = data.datasets["train"]
    assert len(dataset) == 12
    for index, sample in enumerate(dataset):
        path = Path(str(dataset.folder)) / dataset.names[index].decode()
        assert data.class_names[sample["label"]] == path.parent.name
        assert np.array_equal(np.asarray(sample["image"]), np.asarray(Image.open(path).convert("RGB")))


def test_batches(folder_root):
    data = ImageFolderDataModule(root=folder_root, **SMALL)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "index"}
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32


def test_epochs_are_augmented_anew_and_reproducibly(folder_root):
    def epoch(number: int, workers: int) -> dict[int, torch.Tensor]:
        data = ImageFolderDataModule(root=folder_root, seed=3, **{**SMALL, "num_workers": workers})
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        batches = list(loader)
        return {
            int(i): image
            for batch in batches
            for i, image in zip(batch["index"], batch["image"], strict=True)
        }

    first, again, next_epoch = epoch(0, 0), epoch(0, 2), epoch(1, 0)
    for index, image in first.items():
        assert torch.equal(image, again[index])
        assert not torch.equal(image, next_epoch[index])


def test_predictions_have_paths(folder_root):
    data = ImageFolderDataModule(root=folder_root, **SMALL)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert [Path(path).parent.parent for path in batch["path"]] == [folder_root / "val"] * 3
    assert batch["index"].tolist() == [0, 1, 2]


def test_missing_split_falls_back(folder_root, tmp_path):
    data = ImageFolderDataModule(root=folder_root, **SMALL)
    data.setup("test")
    assert data.datasets["test"].folder == folder_root / "val"
    root = copied(folder_root, tmp_path)
    (root / "val").rename(root / "test")
    data = ImageFolderDataModule(root=root, **SMALL)
    data.setup("validate")
    assert data.datasets["val"].folder == root / "test"


def test_other_folder_names(folder_root, tmp_path):
    root = copied(folder_root, tmp_path)
    (root / "train").rename(root / "training")
    (root / "val").rename(root / "held_out")
    data = ImageFolderDataModule(root=root, train_dir="training", val_dir="held_out", **SMALL)
    data.setup("fit")
    assert len(data.datasets["train"]) == 12
    assert len(data.datasets["val"]) == 3


def test_evaluation_without_training_data(folder_root, tmp_path):
    root = copied(folder_root, tmp_path)
    shutil.rmtree(root / "train")
    data = ImageFolderDataModule(root=root, **SMALL)
    data.setup("test")
    assert data.num_classes == 3
    with pytest.raises(FileNotFoundError, match="train does not exist"):
        data.setup("fit")


def test_formats_and_stray_files(tmp_path):
    for split in ("train", "val"):
        for name in ("b", "a"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for suffix in ("JPEG", "jpg", "png", "webp", "bmp"):
                Image.new("L", (20, 20), 128).save(folder / f"x.{suffix}")
            (folder / ".hidden.jpg").touch()
            (folder / "notes.txt").touch()
    (tmp_path / "train/.cache").mkdir()
    data = ImageFolderDataModule(root=tmp_path, **SMALL)
    data.setup("fit")
    assert data.class_names == ["a", "b"]
    assert len(data.datasets["train"]) == 10
    assert data.datasets["train"][0]["image"].mode == "RGB"


def test_class_that_training_lacks(folder_root, tmp_path):
    root = copied(folder_root, tmp_path)
    for name in ("unknown_a", "unknown_b"):
        (root / "val" / name).mkdir()
    with pytest.raises(
        ValueError, match=r"copy/val has class folders that .*train lacks: unknown_a, unknown_b"
    ):
        ImageFolderDataModule(root=root, **SMALL).setup("fit")


def test_empty_class(folder_root, tmp_path):
    root = copied(folder_root, tmp_path)
    (root / "train/zzz").mkdir()
    with pytest.raises(ValueError, match="class folders without an image: zzz"):
        ImageFolderDataModule(root=root, **SMALL).setup("fit")


def test_unsorted_images(folder_root, tmp_path):
    root = copied(folder_root, tmp_path)
    for path in list((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / path.name)
    with pytest.raises(ValueError, match=r"3 images lie in it unsorted; each class needs a folder"):
        ImageFolderDataModule(root=root, **SMALL).setup("validate")


def test_no_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolderDataModule(root=tmp_path, **SMALL).setup("fit")


def test_missing_root(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/train does not exist.*train/<class>.*sample: true"
    ) as caught:
        ImageFolderDataModule(root=tmp_path / "nowhere").setup("fit")
    assert "download" not in str(caught.value)


def test_names_are_one_array():
    dataset = ImageFileDataset(Path("x"), ["a/ü.jpg", "b.jpg"])
    assert isinstance(dataset.names, np.ndarray)
    assert dataset.names[0].decode() == "a/ü.jpg"


class TestImageNet:
    def test_sample(self, tmp_path):
        data = ImageNetDataModule(
            root=tmp_path / "new", sample=True, sample_size=12, sample_classes=3, **SMALL
        )
        assert data.num_classes == 3
        names = data.class_names
        data.prepare_data()
        data.setup("fit")
        assert data.class_names == names == ["n90000000", "n90000001", "n90000002"]
        assert len(data.datasets["train"]) == 12

    def test_number_of_classes(self, tmp_path):
        assert ImageNetDataModule(root=tmp_path / "nowhere").num_classes == 1000
        for number in range(3):
            (tmp_path / f"train/n0000000{number}").mkdir(parents=True)
        with pytest.raises(ValueError, match="has 3 class folders, ImageNet-1K has 1000"):
            ImageNetDataModule(root=tmp_path).setup("fit")

    def test_names_of_classes(self, tmp_path):
        (tmp_path / "train/tench").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"no WordNet ids .*: tench.*ImageFolderDataModule"):
            ImageNetDataModule(root=tmp_path).setup("fit")
