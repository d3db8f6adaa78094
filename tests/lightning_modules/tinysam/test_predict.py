"""Prediction with prompts from a file, and everything mode as a measure."""

import json

import pytest

from datamodules import SA1BDataModule
from datamodules.reading import DataError
from lightning_modules.tinysam import Protocol
from lightning_modules.tinysam.everything import Everything


def test_recall_is_measured(student, data, trainer):
    options = Everything(points_per_side=4, pred_iou_thresh=-9.0, stability_score_thresh=0.0)
    module = student(protocol=Protocol("everything", everything=options))
    scores = trainer().test(module, data(val_masks=3), verbose=False)[0]
    assert set(scores) == {f"test/{name}" for name in ("recall50", "recall75", "miou", "masks", "seconds")}
    assert scores["test/recall75"] <= scores["test/recall50"] <= 1
    assert scores["test/masks"] > 0


@pytest.fixture
def prompted(scenes, tmp_path):
    """A data module of the validation pictures with prompts."""

    def make(prompts):
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        data = SA1BDataModule(
            root=scenes,
            image_size=64,
            val_fraction=0.1,
            val_images=1,
            num_workers=0,
            prompts=tmp_path / "prompts.json",
        )
        data.setup("predict")
        return data, data.datasets["predict"][0].key

    return make


def test_prompts_are_answered_in_order(student, prompted, trainer):
    _, key = prompted({})
    given = [{"points": [[5, 5]], "labels": [1]}, {"box": [2, 2, 30, 30]}]
    data, _ = prompted({key: given})
    (outputs,) = trainer().predict(student(), data)
    (records,) = outputs["records"]
    assert [record.get("box") for record in records] == [None, [2, 2, 30, 30]]
    assert json.dumps(records)
    for record in records:
        assert record["bbox"][2] * record["bbox"][3] >= record["area"]


def test_what_is_wrong_with_prompts(student, prompted, trainer):
    data, key = prompted({"else.jpg": [{"box": [1, 2, 3, 4]}]})
    with pytest.raises(DataError, match=f"prompts: there is none for the picture {key} .there are for else"):
        trainer().predict(student(), data)
    data, _ = prompted({key: [{"point": [1, 2]}]})
    with pytest.raises(
        DataError, match=rf"prompts\.json: {key}\[0\] is .*; points and labels, a box, or all"
    ):
        trainer().predict(student(), data)
    data, _ = prompted({key: [{"points": [[500, 5]], "labels": [1]}]})
    with pytest.raises(ValueError, match=r"a point at \(500, 5\) is outside of the picture"):
        trainer().predict(student(), data)
    data, _ = prompted({key: [{"box": [9, 2, 3, 4]}]})
    with pytest.raises(ValueError, match="x0 <= x1"):
        trainer().predict(student(), data)
