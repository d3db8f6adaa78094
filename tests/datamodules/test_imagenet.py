import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules.imagenet import ImageFileDataset, ImageFolderDataModule, ImageNetDataModule
from datamodules.reading import DataError
from datamodules.transforms import ImageTransforms
from tests.fuzzing import fuzz, outcome

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


def test_sub_folders_of_a_class_belong_to_it(tmp_path, caplog):
    for split in ("train", "val"):
        for folder, count in (("dog", 2), ("dog/poodle", 6), ("cat", 4), ("cat/__MACOSX", 1), (".cache", 1)):
            (tmp_path / split / folder).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 20)).save(tmp_path / split / folder / f"{number}.webp")
        (tmp_path / split / "cat/self").symlink_to(tmp_path / split / "cat")
        (tmp_path / split / "all").symlink_to(tmp_path / split)
        (tmp_path / split / "readme.txt").touch()
    data = ImageFolderDataModule(root=tmp_path, **SMALL)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    assert np.bincount(data.datasets["train"].labels).tolist() == [4, 8]
    assert (
        f"ImageFolderDataModule, train: 12 images of 2 classes in {tmp_path / 'train'} "
        "(left out: 2 hidden, 2 other)." in caplog.text
    )


@pytest.mark.parametrize("world", [1, 2])
def test_training_images_that_make_no_batch(folder_root, world):
    data = ImageFolderDataModule(root=folder_root, **{**SMALL, "batch_size": 7 if world == 2 else 13})
    data.setup("fit")
    data.trainer = SimpleNamespace(
        strategy=None, distributed_sampler_kwargs={"rank": 0, "num_replicas": world}, lightning_module=None
    )
    each = r" \(6 for each of 2 processes\)" if world == 2 else ""
    with pytest.raises(
        MisconfigurationException,
        match=rf"12 training samples{each} make no whole batch of batch_size: {data.batch_size}",
    ):
        data.train_dataloader()
    data.drop_last = False
    assert sum(len(batch["label"]) for batch in data.train_dataloader()) == 12 // world


def test_a_split_without_a_sample(folder_root):
    data = ImageFolderDataModule(root=folder_root, **SMALL)
    data.datasets["test"] = ImageFileDataset(folder_root, [])
    with pytest.raises(DataError, match=rf"the test data in {folder_root} has no samples"):
        data.test_dataloader()


@fuzz(60)
@given(
    files=st.lists(
        st.tuples(
            st.sampled_from(["train", "val", "test", "Train"]),
            st.lists(st.sampled_from(["a", "b", ".h", "__MACOSX"]), max_size=3).map("/".join),
            st.sampled_from(["a.png", "b.JPG", "c.txt", "._d.png", "e.webp"]),
        ),
        max_size=12,
    ),
    link=st.none() | st.tuples(st.integers(0, 11), st.integers(0, 11)),
)
def test_any_tree_is_read_or_refused(tmp_path, files, link):
    root = tmp_path / "tree"
    shutil.rmtree(root, ignore_errors=True)
    for split, folder, name in files:
        (root / split / folder).mkdir(parents=True, exist_ok=True)
        (root / split / folder / name).touch()
    if link is not None and files:
        source, target = (
            root / files[place % len(files)][0] / files[place % len(files)][1] for place in link
        )
        (source / "link").symlink_to(target)
    data = ImageFolderDataModule(root=root, **SMALL)
    result = outcome(lambda: [data.setup(stage) for stage in ("fit", "test")] and data.datasets, root)
    for dataset in (result.value or {}).values():
        for name, label in zip(dataset.names, dataset.labels, strict=True):
            assert name.decode().split("/")[0] == data.class_names[label]


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
