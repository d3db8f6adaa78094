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


def test_number_of_classes(photos):
    assert ImagesDataModule(root=photos, num_classes=7).num_classes == 7
    with pytest.raises(MisconfigurationException, match="set num_classes"):
        _ = ImagesDataModule(root=photos).num_classes


def test_sample(tmp_path):
    data = ImagesDataModule(root=tmp_path / "pictures", sample=True, **SMALL)
    data.prepare_data()
    data.setup("predict")
    assert len(data.datasets["predict"]) == 12
