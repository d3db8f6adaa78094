"""Detections as COCO's results JSON and as drawn pictures."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from callbacks.writers.detection import DetectionWriter, colour_of, draw_detections


class Scenes(LightningDataModule):
    """Five pictures on disk, labels 0 and 2 of three have a category."""

    class_names = ("cat", "no class", "dog")
    category_ids = (17, -1, 18)

    def __init__(self, folder) -> None:
        super().__init__()
        self.items = []
        for index in range(5):
            path = folder / f"{index:012d}.png"
            Image.new("RGB", (60, 40), "black").save(path)
            self.items.append({"index": index, "path": str(path), "image_id": 100 + index})

    def predict_dataloader(self):
        return DataLoader(self.items, batch_size=2)


class Detector(LightningModule):
    """Three detections an image: good, of a label without category, and poor."""

    num_classes = 3

    def predict_step(self, batch, batch_idx):
        count = len(batch["index"])
        boxes = torch.tensor([[5.0, 5, 25, 30], [0, 0, 10, 10], [30, 10, 70, 45]]).expand(count, 3, 4)
        scores = torch.tensor([0.9, 0.8, 0.1]).expand(count, 3)
        known = {key: batch[key] for key in ("index", "path", "image_id")}
        return {"boxes": boxes, "scores": scores, "labels": torch.tensor([0, 1, 2]).expand(count, 3), **known}


def predict(trainer, tmp_path, writer, **options):
    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    run = trainer(callbacks=[writer], default_root_dir=str(tmp_path / "run"), **options)
    run.predict(Detector(), datamodule=Scenes(folder))
    return json.loads((tmp_path / "run" / "detections.json").read_text())


def test_json_is_cocos_results_format(trainer, tmp_path):
    found = predict(trainer, tmp_path, DetectionWriter())
    assert len(found) == 10, "two of three labels have a category"
    assert found[0] == {
        "image_id": 100,
        "file_name": "000000000000.png",
        "category_id": 17,
        "category_name": "cat",
        "bbox": [5, 5, 20, 25],
        "score": pytest.approx(0.9),
    }
    assert found[1]["category_id"] == 18
    assert found[1]["bbox"] == [30, 10, 40, 35], "boxes are not clipped"
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 100 + n} for n in range(5)],
        "annotations": [],
        "categories": [],
        "info": {},
    }
    truth.createIndex()
    assert len(truth.loadRes(str(tmp_path / "run" / "detections.json")).anns) == 10


def test_names_that_are_no_unicode_stay_readable_by_every_program(trainer, tmp_path):
    class Odd(Scenes):
        class_names = ("c\udce9t", "no class", "new\nline")

        def __init__(self, folder) -> None:
            super().__init__(folder)
            self.items = [{**self.items[0], "path": str(folder / "caf\udce9.png")}]
            Image.new("RGB", (60, 40)).save(self.items[0]["path"])

    run = trainer(callbacks=[DetectionWriter(draw_score=0)], default_root_dir=str(tmp_path / "run"))
    run.predict(Detector(), datamodule=Odd(tmp_path))
    text = (tmp_path / "run" / "detections.json").read_text()
    assert "udce9" not in text
    found = json.loads(text)
    assert [row["file_name"] for row in found] == ["caf\\xe9.png"] * 2
    assert [row["category_name"] for row in found] == ["c\\xe9t", "new\nline"]


def test_scores_below_the_least_are_left_out(trainer, tmp_path):
    found = predict(trainer, tmp_path, DetectionWriter(min_score=0.5))
    assert [row["category_id"] for row in found] == [17] * 5


def test_pictures_show_the_good_detections(trainer, tmp_path, capsys):
    predict(trainer, tmp_path, DetectionWriter(draw_score=0.99, max_pictures=3))
    assert "0 of 3 have a box of score 0.99 or more (draw_score)" in capsys.readouterr().out
    predict(trainer, tmp_path, DetectionWriter(draw_score=0.5, max_pictures=3))
    assert "3 of 3 have a box of score 0.5 or more" in capsys.readouterr().out
    drawn = sorted((tmp_path / "run" / "detections").iterdir())
    assert [path.name for path in drawn] == [f"{n:06d}_{n:012d}.jpg" for n in range(3)]
    pixels = np.asarray(Image.open(drawn[0]).convert("RGB")).max(axis=2)
    assert pixels[29:31, 8:22].max(axis=0).min() > 100, "the lower edge of the good box"
    assert pixels[36:, 30:].max() < 60, "the poor box is not drawn"


def test_no_pictures_when_none_are_wanted(trainer, tmp_path):
    predict(trainer, tmp_path, DetectionWriter(max_pictures=0))
    assert not (tmp_path / "run" / "detections").exists()


def test_an_earlier_runs_pictures_are_gone(trainer, tmp_path):
    predict(trainer, tmp_path, DetectionWriter())
    predict(trainer, tmp_path, DetectionWriter(max_pictures=1))
    assert len(list((tmp_path / "run" / "detections").iterdir())) == 1


def test_two_ranks_write_what_one_writes(trainer, tmp_path):
    one = predict(trainer, tmp_path, DetectionWriter())
    two = predict(trainer, tmp_path, DetectionWriter(), strategy="ddp_fork", devices=2)
    assert one == two
    assert len(list((tmp_path / "run" / "detections").iterdir())) == 5


def test_large_pictures_are_scaled_down_with_their_boxes():
    picture = Image.new("RGB", (800, 400), "black")
    drawn = draw_detections(picture, [[400, 200, 200, 100, 0.9, 0]], ["cat"], max_side=400)
    assert drawn.size == (400, 200)
    pixels = np.asarray(drawn).max(axis=2)
    assert pixels[149:151, 205:295].max(axis=0).min() > 200
    assert picture.getextrema() == ((0, 0),) * 3, "the given picture must stay as it was"


@pytest.mark.parametrize("box", [[-50, -50, 30, 30], [390, 190, 500, 500], [10, 10, -5, 0], [0, 0, 0, 0]])
def test_boxes_anywhere_can_be_drawn(box):
    draw_detections(Image.new("RGB", (400, 200)), [[*box, 0.9, 7]], ["cat"])


def test_neighbouring_labels_differ_in_colour():
    assert len({colour_of(label) for label in range(40)}) == 40


def test_predictions_that_are_none_are_refused(trainer, tmp_path):
    class Other(Detector):
        def predict_step(self, batch, batch_idx):
            return torch.zeros(2)

    run = trainer(callbacks=[DetectionWriter()])
    with pytest.raises(MisconfigurationException, match="Other returned Tensor"):
        run.predict(Other(), datamodule=Scenes(tmp_path))


@pytest.mark.parametrize("options", [{"min_score": -0.1}, {"draw_score": 1.5}, {"max_pictures": -1}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DetectionWriter(**options)
