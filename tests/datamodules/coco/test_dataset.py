"""Pictures as they were annotated, outlines that are checked, and files that lie outside."""

import json
import logging
import os

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from pycocotools import mask as coco_mask

from callbacks.writers.detection import DetectionWriter
from datamodules.coco.segmentation import decode_segmentation
from tests.datamodules.coco.conftest import content
from tests.fuzzing import outcome

IDS = {1: "car", 2: "person", 3: "dog"}
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""From the upright picture to what a camera stores with an orientation."""


def save_turned(path, orientation: int) -> Image.Image:
    """Store the picture at `path` the way a camera does that was held so; gives what is stored."""
    upright = Image.open(path).convert("RGB")
    stored = upright if TURNS[orientation] is None else upright.transpose(TURNS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    return stored


def lit(image: Image.Image, box) -> float:
    """Share of a box under which the red car lies."""
    x1, y1, x2, y2 = (round(float(side)) for side in box)
    pixels = np.asarray(image)[y1:y2, x1:x2]
    return float((pixels[..., 0] > 200).mean()) if pixels.size else 0.0


@pytest.mark.parametrize("orientation", TURNS)
def test_a_box_lies_on_its_object_whichever_way_the_camera_was_held(orientation, made, coco):
    path = made("val", content(IDS, [["car"]])).parent.parent / "val2017" / "0.png"
    save_turned(path, orientation)
    data = coco()
    data.setup("validate")
    sample = data.datasets["val"][0]
    assert sample["image"].size == (64, 48), "upright"
    assert lit(sample["image"], sample["boxes"][0]) == 1


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_box_drawn_on_the_stored_pixels_lies_on_its_object(orientation, made, coco, tmp_path):
    """Tools that ignore the EXIF: the size in the JSON is that of the file, and so are the boxes."""
    instances = content(IDS, [["car"]])
    path = made("val", instances).parent.parent / "val2017" / "0.png"
    stored = np.asarray(save_turned(path, orientation))
    rows, columns = np.nonzero(stored[..., 0] > 200)
    corner = (int(columns.min()), int(rows.min()))
    box = [*corner, int(columns.max()) + 1 - corner[0], int(rows.max()) + 1 - corner[1]]
    instances["images"][0] |= {"width": 48, "height": 64}
    instances["annotations"][0] |= {"bbox": box}
    made("val", instances, pictures=False)
    data = coco()
    data.setup("validate")
    sample = data.datasets["val"][0]
    np.testing.assert_array_equal(np.asarray(sample["image"]), stored)
    assert lit(sample["image"], sample["boxes"][0]) == 1
    assert sample["orig_size"].tolist() == [64, 48]
    run = Trainer(
        default_root_dir=tmp_path,
        callbacks=[DetectionWriter()],
        **{"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    )
    run.predict(Boxes(), datamodule=data)
    with Image.open(tmp_path / "detections" / "000000_0.jpg") as drawn:
        assert drawn.size == (48, 64), "turned as the predictions are"


class Boxes(LightningModule):
    """Predicts the boxes that the data has."""

    num_classes = 4

    def predict_step(self, batch, batch_idx):
        import torch

        targets = batch["targets"]
        known = {key: batch[key] for key in ("index", "path")}
        known |= {"image_id": torch.stack([target["image_id"] for target in targets])}
        boxes = torch.stack([target["boxes"][:1] for target in targets])
        return {
            "boxes": boxes,
            "scores": boxes[..., 0] * 0 + 0.9,
            "labels": (boxes[..., 0] * 0 + 1).long(),
            **known,
        }


def test_a_folder_is_predicted_on_and_drawn_upright(made, coco, tmp_path):
    path = made("val", content(IDS, [["car"]])).parent.parent / "val2017" / "0.png"
    save_turned(path, 6)
    data = coco(predict_folder=path.parent)
    data.setup("predict")
    assert data.datasets["predict"][0]["image"].size == (64, 48)
    assert data.picture("turned.jpg", 0).size == (64, 48)
    assert data.predicted_entry(0) == {"image_id": 0, "file_name": "0.png"}


@pytest.mark.parametrize("size", [(640, 480), (48, 64), (64, 47)])
def test_another_size_than_that_of_the_file_is_an_error_with_both(size, made, coco):
    instances = content(IDS)
    instances["images"][0] |= {"width": size[0], "height": size[1]}
    path = made("val", instances)
    data = coco()
    data.setup("validate")
    both = ("64 x 48", f"{size[0]} x {size[1]}")
    refused = outcome(lambda: data.datasets["val"][0], path, "val2017/0.png", "images[0]", *both)
    assert not refused.read


# Outlines

SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]


def masks(shape, made, coco, index: int = 0):
    instances = content(IDS, [["car"]])
    instances["annotations"][0]["segmentation"] = shape
    made("train", instances)
    made("val", instances)
    data = coco(masks=True)
    data.setup("fit")
    return data.datasets["train"][index]["masks"]


@pytest.mark.parametrize(
    ("shape", "pixels", "skipped"),
    [
        ([SQUARE], 400, 0),
        (SQUARE, 400, 0),
        ([[str(value) for value in SQUARE]], 400, 0),
        ([[], SQUARE], 400, 1),
        ([[]], 0, 1),
        ([[10, 10, 30, 30]], 0, 1),
        ([[10, 10, 30, 30], SQUARE], 400, 1),
        ([10, 10, 30, 30], 0, 1),
        ({"size": [48, 64], "counts": [10, 5, 3057]}, 5, 0),
        ({"size": [48.0, 64], "counts": [0, 3072]}, 3072, 0),
    ],
    ids=str,
)
def test_parts_that_enclose_nothing_are_left_out_and_counted(shape, pixels, skipped, made, coco, caplog):
    with caplog.at_level(logging.WARNING):
        found = masks(shape, made, coco)
    assert int(found.sum()) == pixels
    said = f"{skipped} polygon parts of fewer than three points"
    assert (said in caplog.text) == bool(skipped)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "polygon"),
        ([[1, 2, 3, 4, 5, "six"]], "polygon"),
        ([[1, 2, 3, 4, float("nan"), 6]], "polygon"),
        ([[1, 2, 3, 4, 1e9, 6]], "far outside"),
        ([[0, 0, 1e6, 0, 0, 1e6] * 2000], "far outside"),
        ([[[1, 2], [3, 4], [5, 6]]], "polygon"),
        ([SQUARE, 7], "polygon"),
        ("outline", "outline"),
        ({"counts": [1, 2]}, "size"),
        ({"size": [48, 64]}, "counts"),
        ({"size": [64, 48], "counts": [0, 3072]}, "48 high and 64 wide"),
        ({"size": [4800, 6400], "counts": [0, 30720000]}, "48 high and 64 wide"),
        ({"size": None, "counts": [0, 3072]}, "size None"),
        ({"size": [48, 64], "counts": [10, 5]}, "add up to 15"),
        ({"size": [48, 64], "counts": [10, -5, 3067]}, "run lengths"),
        ({"size": [48, 64], "counts": [10.5, 3061.5]}, "run lengths"),
        ({"size": [48, 64], "counts": ["a"]}, "run lengths"),
        ({"size": [48, 64], "counts": 3072}, "run lengths"),
        ({"size": [48, 64], "counts": "not run lengths"}, "run lengths"),
        ({"size": [48, 64], "counts": "b'0`0'"}, "run lengths"),
        ({"size": [48, 64], "counts": "P"}, "run lengths"),
        ({"size": [48, 64], "counts": ""}, "add up to 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_outlines_that_do_not_fit_name_the_annotation_and_the_picture(shape, said, made, coco):
    names = ("instances_train2017.json", "annotations[0]", "train2017/0.png", said)
    assert not outcome(lambda: masks(shape, made, coco), *names).read


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for height, width, share in ((7, 5, 0.5), (48, 64, 0.02), (48, 64, 0.9), (300, 200, 0.001), (1, 1, 1)):
        mask = rng.random((height, width)) < share
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        for counts in (packed["counts"], packed["counts"].decode()):
            shape = {"size": [height, width], "counts": counts}
            np.testing.assert_array_equal(decode_segmentation(shape, height, width), mask)


def test_objects_without_an_outline_count_where_masks_are_wanted(made, coco, caplog):
    with caplog.at_level(logging.WARNING):
        assert masks(None, made, coco).sum() == 0
    assert "1 objects have no segmentation" in caplog.text


# Files outside


@pytest.fixture
def secret(tmp_path, made):
    """A data set, and a picture beside it that is none of its business."""
    made("train", content(IDS))
    instances = content(IDS)
    made("val", instances)
    path = tmp_path / "private" / "secret.png"
    path.parent.mkdir()
    Image.new("RGB", (64, 48), "white").save(path)

    def named(name: str):
        instances["images"][0]["file_name"] = name
        made("val", instances, pictures=False)
        return path

    return named


@pytest.mark.parametrize("kind", ["up", "up and down", "absolute", "windows", "absolute windows"])
def test_file_names_that_lead_out_of_root_are_refused(kind, secret, coco, tmp_path):
    names = {
        "up": "../../private/secret.png",
        "up and down": "deeper/../../../private/secret.png",
        "absolute": str(tmp_path / "private" / "secret.png"),
        "windows": "..\\..\\private\\secret.png",
        "absolute windows": str(tmp_path / "private" / "secret.png").replace("/", "\\"),
    }
    path = secret(names[kind])
    for stage in ("fit", "validate", "test", "predict"):
        said = ("instances_val2017.json", "images[0]", "allow_outside")
        assert not outcome(lambda stage=stage: coco().setup(stage), *said).read
    allowed = coco(allow_outside=True)
    allowed.setup("predict")
    assert allowed.datasets["predict"][0]["image"].getextrema() == ((255, 255),) * 3
    assert os.path.samefile(allowed.datasets["predict"].path(0), path)


def test_a_way_up_behind_a_link_stays_inside(secret, coco, tmp_path):
    """`link/..` is the folder that the link leads into, to the system; by its name it is the data's."""
    (tmp_path / "private" / "deeper").mkdir()
    (tmp_path / "coco" / "val2017" / "link").symlink_to(tmp_path / "private" / "deeper")
    secret("link/../secret.png")
    data = coco()
    data.setup("predict")
    refused = outcome(lambda: data.datasets["predict"][0], str(tmp_path / "coco" / "val2017" / "secret.png"))
    assert not refused.read


def test_links_and_names_that_stay_inside_are_read(made, coco, tmp_path):
    """Whole splits are links, roots are links, names go up and down or are absolute within root."""
    instances = content(IDS, [["car"]] * 3)
    path = made("val", instances)
    pictures = path.parent.parent / "val2017"
    elsewhere = tmp_path / "disk"
    pictures.rename(elsewhere)
    pictures.symlink_to(elsewhere)
    (elsewhere / "1.png").rename(tmp_path / "moved.png")
    (elsewhere / "1.png").symlink_to(tmp_path / "moved.png")
    (tmp_path / "shortcut").symlink_to(tmp_path / "coco")
    instances["images"][0]["file_name"] = "../val2017/0.png"
    instances["images"][2]["file_name"] = str(tmp_path / "coco" / "val2017" / "2.png")
    made("val", instances, pictures=False)
    for root in (tmp_path / "coco", tmp_path / "shortcut", os.path.relpath(tmp_path / "coco")):
        data = coco(root=root)
        data.setup("validate")
        assert [lit(data.datasets["val"][row]["image"], [4, 6, 24, 22]) for row in range(3)] == [1, 1, 1]


def test_names_of_many_digits_and_long_names_are_predicted_on(coco, tmp_path, made):
    made("train", content(IDS))
    folder = tmp_path / "photos"
    folder.mkdir()
    for stem in ("1" * 20, "2" * 20, "3" * 245):
        Image.new("RGB", (64, 48)).save(folder / f"{stem}.png")
    data = coco(predict_folder=folder)
    data.setup("predict")
    (first, second) = data.predict_dataloader()
    assert [int(target["image_id"]) for batch in (first, second) for target in batch["targets"]] == [0, 1, 2]
    writer = DetectionWriter(draw_score=0)
    run = Trainer(
        default_root_dir=tmp_path / "run",
        callbacks=[writer],
        **{"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    )
    run.predict(Empty(), datamodule=data)
    assert len(list((tmp_path / "run" / "detections").iterdir())) == 3
    assert json.loads((tmp_path / "run" / "detections.json").read_text()) == []


class Empty(LightningModule):
    """Finds nothing."""

    num_classes = 4

    def predict_step(self, batch, batch_idx):
        import torch

        count = len(batch["path"])
        known = {key: batch[key] for key in ("index", "path")}
        known |= {"image_id": torch.stack([target["image_id"] for target in batch["targets"]])}
        empty = torch.zeros(count, 0)
        return {"boxes": torch.zeros(count, 0, 4), "scores": empty, "labels": empty.long(), **known}
