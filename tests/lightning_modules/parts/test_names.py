import csv

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.writers.classification import ClassificationWriter
from lightning_modules import ImageClassifier
from lightning_modules.parts.names import compare_names

NAMES = ["cat", "ship", "truck", "horse"]


def classifier():
    return ImageClassifier("test_vit", num_classes=4, model_args={"img_size": 32})


def named(data, names):
    data.class_names = names
    return data


@pytest.fixture
def checkpoint(trainer, blob_data, tmp_path):
    """Of a classifier that was trained on classes of these names."""
    run = trainer(limit_train_batches=1, limit_val_batches=0)
    run.fit(classifier(), named(blob_data(), NAMES))
    run.save_checkpoint(tmp_path / "trained.ckpt")
    return tmp_path / "trained.ckpt"


def test_names_travel_to_predictions_on_data_without_names(trainer, blob_data, checkpoint, tmp_path):
    assert torch.load(checkpoint, weights_only=True)["class_names"] == NAMES
    run, module = trainer(callbacks=[ClassificationWriter(sheet_images=0)]), classifier()
    run.predict(module, named(blob_data(length=8), None), ckpt_path=checkpoint, weights_only=True)
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["name_1"] == NAMES[int(row["class_1"])] for row in rows)
    again = {"state_dict": {}}
    module.on_save_checkpoint(again)  # of a run on data without names: they travel on
    assert again["class_names"] == NAMES


def test_classes_in_another_order_are_refused_and_other_names_are_announced(blob_data, recwarn):
    compare_names(NAMES, named(blob_data(), list(NAMES)))
    compare_names(NAMES, named(blob_data(), None))
    assert not recwarn
    with pytest.raises(MisconfigurationException, match="another order than the checkpoint's: ship for cat"):
        compare_names(NAMES, named(blob_data(), ["ship", "cat", "truck", "horse"]))
    with pytest.warns(UserWarning, match=r"other class names .* \(2 and 4: dog for cat"):
        compare_names(NAMES, named(blob_data(), ["dog", "ship"]))


def test_the_sheet_shows_images_from_all_over_the_data(trainer, blob_data, tmp_path):
    class Watched(ClassificationWriter):
        def _draw(self, shown, names, shards):
            self.shown = [row["index"] for row in shown]
            return super()._draw(shown, names, shards)

    writer = Watched(sheet_images=4)
    trainer(callbacks=[writer]).predict(classifier(), blob_data(length=30))
    first, second, third, fourth = writer.shown
    assert first < 7 <= second < 15 <= third < 22 <= fourth < 30  # one in each quarter
    trainer(callbacks=[writer], limit_predict_batches=2).predict(classifier(), blob_data(length=30))
    first, second, third, fourth = writer.shown
    assert first < 3 <= second < 7 <= third < 11 <= fourth < 15  # of half of them
    assert (tmp_path / "contact_sheet.png").is_file()
