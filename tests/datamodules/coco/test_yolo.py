import json
import os

import pytest
from PIL import Image

from datamodules import YoloDataModule
from datamodules.coco.yolo import class_names
from datamodules.reading import DataError


@pytest.fixture
def root(tmp_path):
    """Two training pictures, the second turned by its EXIF and without a label file; one to validate."""
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (80, 40)).save(tmp_path / "images" / split / "a.png")
        (tmp_path / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0 0 0.5 0 0.5 1\n")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "images" / "train" / "b.jpg", exif=turned)
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    return tmp_path


def prepared(root, **options):
    data = YoloDataModule(root=root, num_workers=0, **options)
    data.prepare_data()
    return data


def test_boxes_and_polygons_in_pixels(root):
    data = prepared(root)
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    content = json.loads((root / "annotations" / "yolo_train.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a.png", "width": 80, "height": 40},
        {"id": 2, "file_name": "b.jpg", "width": 40, "height": 80},
    ]
    dog, cat = content["annotations"]
    assert (dog["category_id"], dog["bbox"], dog["area"]) == (1, [30, 10, 20, 20], 400)
    assert (cat["category_id"], cat["bbox"]) == (0, [0, 0, 40, 40])
    assert cat["segmentation"] == [[0, 0, 40, 0, 40, 40]]
    batch = next(iter(data.val_dataloader()))
    assert batch["targets"][0]["labels"].tolist() == [1, 0]


def test_it_is_written_again_where_a_label_is_newer(root):
    prepared(root)
    file = root / "annotations" / "yolo_val.json"
    before = file.stat().st_mtime_ns
    prepared(root)
    label = root / "labels" / "val" / "a.txt"
    if file.stat().st_mtime_ns == before:  # else the clock of this disk is coarse, and it was written again
        label.write_text("1 0.5 0.5 1 1\n")
        os.utime(label, ns=(before + 10**9, before + 10**9))
        prepared(root)
    assert len(json.loads(file.read_text())["annotations"]) == (1 if "1 1" in label.read_text() else 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 1 1", "a.txt, line 1: class 2, but data.yaml names 2"),
        ("x 0.5 0.5 1 1", "line 1: expected numbers, got 'x 0.5"),
        ("1 0.5 0.5 1", "got 3 numbers"),
        ("1 40 20 20 20", "expected fractions of the picture"),
    ],
)
def test_a_wrong_line_is_named(root, line, message):
    (root / "labels" / "val" / "a.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        prepared(root)


def test_what_has_no_names_or_no_pictures(root):
    (root / "images" / "val" / "a.png").unlink()
    with pytest.raises(DataError, match=r"images/val has no images"):
        prepared(root)
    for content in ("names: [cat, cat]", "names: {1: cat}"):
        (root / "data.yaml").write_text(content)
        with pytest.raises(DataError, match="names must be a list, or a mapping of 0, 1"):
            class_names(root)
    (root / "data.yaml").unlink()
    with pytest.raises(DataError, match="no YAML file with the `names`"):
        class_names(root)
