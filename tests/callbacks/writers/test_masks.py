import json

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from pycocotools import mask as coco_mask

from callbacks import MaskWriter
from callbacks.writers.masks import cut_out, overlay_of


def record(mask, iou):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    segmentation = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    return {"segmentation": segmentation, "area": int(mask.sum()), "bbox": [0, 0, 1, 1], "predicted_iou": iou}


@pytest.fixture
def run(tmp_path):
    """Write a batch's records; the trainer and the file's rows."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (12, 8), (10, 20, 30)).save(path)

    def make(writer, records):
        trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
        module = pl.LightningModule()
        writer.on_predict_start(trainer, module)
        outputs = {"index": [0], "path": [str(path)], "records": [records]}
        writer.on_predict_batch_end(trainer, module, outputs, None, 0)
        writer.on_predict_end(trainer, module)
        return json.loads((tmp_path / "masks.json").read_text())

    return make


def test_masks_come_back_as_they_were(run, tmp_path):
    mask = np.zeros((8, 12), bool)
    mask[2:5, 3:9] = True
    rows = run(MaskWriter(min_score=0.5, cut_outs=True), [record(mask, 0.9), record(~mask, 0.4)])
    (row,) = rows
    assert (row["image_id"], row["file_name"], row["score"]) == (0, "photo.png", 0.9)
    assert (coco_mask.decode(row["segmentation"]).astype(bool) == mask).all()
    drawn = np.asarray(Image.open(tmp_path / "masks" / "000000_photo.png"))
    assert drawn.shape == (8, 12, 3)
    assert ((drawn != (10, 20, 30)).any(axis=-1) == mask).all()
    cut = np.asarray(Image.open(tmp_path / "masks" / "000000_photo_000.png"))
    assert cut.shape == (3, 6, 4)
    assert (cut == (10, 20, 30, 255)).all()


def test_empty_masks_are_written_and_nothing_is_cut_out(run, tmp_path):
    (row,) = run(MaskWriter(cut_outs=True), [record(np.zeros((8, 12), bool), 0.9)])
    assert row["area"] == 0
    assert [file.name for file in (tmp_path / "masks").iterdir()] == ["000000_photo.png"]
    assert cut_out(np.zeros((8, 12, 3), np.uint8), np.zeros((8, 12), bool)).size == (1, 1)


def test_small_masks_lie_on_top():
    large, small = np.ones((8, 12), bool), np.zeros((8, 12), bool)
    small[0, 0] = True
    for order in ([large, small], [small, large]):
        layer = np.asarray(overlay_of(order))
        assert (layer[0, 0] != layer[1, 1]).any()


def test_a_module_without_masks_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="predict_step that returns index, path, records"):
        next(MaskWriter().rows(None, pl.LightningModule(), None, None))
    with pytest.raises(ValueError, match="max_pictures is at least 0"):
        MaskWriter(max_pictures=-1)
