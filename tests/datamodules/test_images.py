import json
import logging
import os

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules.images import ImagesDataModule
from datamodules.transforms import ImageTransforms

SMALL = {"transforms": ImageTransforms(image_size=16), "num_workers": 0, "batch_size": 4}


@pytest.fixture
def photos(tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (255, 0, 0)).save(path)
    (tmp_path / "photos/readme.txt").touch()
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.jpg", "b.png", "deep/c.webp"]),
        ("*.jpg", ["a.jpg"]),
        ("**/*", ["a.jpg", "b.png", "deep/c.webp"]),
        ("b.png", ["b.png"]),
    ],
)
def test_folder_glob_or_file(photos, pattern, expected):
    data = ImagesDataModule(root=photos / pattern, **SMALL)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"image", "index", "path"}
    assert batch["path"] == [str(photos / name) for name in expected]
    assert batch["index"].tolist() == list(range(len(expected)))
    assert batch["image"].shape == (len(expected), 3, 16, 16)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_only_predicts(photos, stage):
    with pytest.raises(MisconfigurationException, match=f"can only predict, not {stage}"):
        ImagesDataModule(root=photos, **SMALL).setup(stage)


@pytest.mark.parametrize("pattern", ["nothing", "*.tiff", "readme.*"])
def test_nothing_there(photos, pattern):
    with pytest.raises(FileNotFoundError, match=r"ImagesDataModule: .*photos"):
        ImagesDataModule(root=photos / pattern, **SMALL).setup("predict")


@pytest.mark.parametrize("pattern", ["", "**/*", "*/**", "**"])
def test_loops_end_and_hidden_files_are_left_out(photos, pattern, caplog):
    for name in ("self", "deep/again"):
        (photos / name).symlink_to(photos)
    for name in ("._a.jpg", "__MACOSX/a.jpg", ".thumbnails/c.png", "deep/Thumbs.db"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).touch()
    data = ImagesDataModule(root=photos / pattern, **SMALL)
    with caplog.at_level(logging.INFO):
        data.setup("predict")
    expected = ["deep/c.webp"] if pattern == "*/**" else ["a.jpg", "b.png", "deep/c.webp"]
    assert [name.decode() for name in data.datasets["predict"].names] == [
        str(photos / name) for name in expected
    ]
    assert f"{len(expected)} images in" in caplog.text
    assert "(left out: 4 hidden, 1 other)" in caplog.text


def test_a_hidden_file_that_is_named_is_read(photos):
    (photos / "a.jpg").rename(photos / ".a.jpg")
    data = ImagesDataModule(root=photos / ".a.jpg", **SMALL)
    data.setup("predict")
    assert len(data.datasets["predict"]) == 1


def test_names_that_are_not_utf8(photos):
    """The path travels through a worker, and names the file."""
    name = os.fsdecode(b"caf\xe9.jpg")
    (photos / "a.jpg").rename(photos / name)
    data = ImagesDataModule(root=photos, **{**SMALL, "num_workers": 1})
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert str(photos / name) in batch["path"]
    assert json.loads(json.dumps(batch["path"])) == batch["path"]


def test_number_of_classes(photos):
    assert ImagesDataModule(root=photos, num_classes=7).num_classes == 7
    with pytest.raises(MisconfigurationException, match="set num_classes"):
        _ = ImagesDataModule(root=photos).num_classes


def test_sample(tmp_path):
    data = ImagesDataModule(root=tmp_path / "pictures", sample=True, **SMALL)
    data.prepare_data()
    data.setup("predict")
    assert len(data.datasets["predict"]) == 12
