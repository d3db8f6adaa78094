"""Labels go by the names of the training file, in training, in COCO's evaluation and in predictions."""

import json
import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from callbacks.writers.detection import DetectionWriter
from datamodules.reading import DataError
from lightning_modules.deco import Deco, DecoDetector
from lightning_modules.deco.boxes import Detections
from tests.datamodules.coco.conftest import COLOURS, content

TRAIN = {1: "car", 2: "person", 3: "dog"}


class Oracle(DecoDetector):
    """Finds all boxes, and tells what is in them by the colour: in the numbers that it was trained with."""

    def __init__(self, labels: dict[str, int], count: int = 4) -> None:
        small = {"encoder_widths": (8, 8, 8), "encoder_depths": (1, 1, 1), "decoder_layers": 1}
        super().__init__(Deco(count, backbone="small", num_queries=4, grid_height=2, hidden_dim=8, **small))
        self.learned = labels

    def detect(self, batch) -> Detections:
        found = [
            self._seen(image, target) for image, target in zip(batch["image"], batch["targets"], strict=True)
        ]
        return Detections(*(torch.stack(part) for part in zip(*found, strict=True)))

    def _seen(self, image, target):
        scores, labels, boxes = torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4)
        scale = (target["orig_size"] / target["size"]).flip(0).repeat(2)
        for place, box in enumerate(target["boxes"]):
            x, y = ((box[:2] + box[2:]) / 2).long()
            colour = torch.tensor(list(COLOURS.values())) / 255
            nearest = int((image[:, y, x] - colour).abs().sum(dim=1).argmin())
            scores[place], boxes[place] = 0.9, box * scale
            labels[place] = self.learned[list(COLOURS)[nearest]]
        return scores, labels, boxes


def precision(truth, results) -> float:
    """AP of a results file against an annotation file, as COCO's server works it out."""
    evaluation = COCOeval(COCO(str(truth)), COCO(str(truth)).loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize(
    "ids",
    [
        TRAIN,
        {1: "dog", 2: "person", 3: "car"},
        {"1": "person", "2": "car", "3": "dog"},
        {"c9f0f895": "dog", "45c48cce": "car", "d3d94468": "person"},
        {2**70: "car", -(2**60): "dog", 0: "person"},
    ],
    ids=["same", "other order", "texts", "hashes", "large numbers"],
)
@pytest.mark.parametrize("contiguous", [False, True])
def test_a_perfect_detector_is_perfect_whatever_a_file_numbers(ids, contiguous, made, coco, tmp_path):
    made("train", content(TRAIN))
    other = content(ids, [["dog", "car"], ["person"], ["car", "person", "dog"]])
    if any(isinstance(key, str) for key in ids):
        names = {10 + row: f"img_{row:03d}" for row in range(3)}
        for entry in other["images"] + other["annotations"]:
            field = "image_id" if "image_id" in entry else "id"
            entry[field] = names[entry[field]]
    truth = made("val", other)
    data = coco(contiguous_labels=contiguous)
    shift = 1 if contiguous else 0
    model = Oracle({name: key - shift for key, name in TRAIN.items()})
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    run = Trainer(default_root_dir=tmp_path / "run", callbacks=[DetectionWriter()], **options)
    (numbers,) = run.test(model, datamodule=data, verbose=False)
    assert numbers["test/AP"] == pytest.approx(1)
    run.predict(model, datamodule=data)
    results = tmp_path / "run" / "detections.json"
    assert precision(truth, results) == pytest.approx(1)
    first = json.loads(results.read_text())[0]
    assert first["file_name"] == "0.png"
    assert first["image_id"] == other["images"][0]["id"]
    assert ids[type(next(iter(ids)))(first["category_id"])] == first["category_name"]


def test_training_numbers_every_split(made, coco):
    made("train", content(TRAIN))
    made("val", content({7: "person", 9: "car"}, [["car"], ["person", "car"]]))
    data = coco()
    data.setup("fit")
    assert [data.datasets["val"][row]["labels"].tolist() for row in (0, 1)] == [[1], [2, 1]]
    truth = data.datasets["val"][1]["annotations"]
    assert [entry["category_id"] for entry in truth] == [2, 1]
    assert data.class_names == ["no class", "car", "person", "dog"]
    data.setup("predict")
    assert data.category_ids == [-1, 9, 7, -1], "ids of the file that is predicted on; it has no dog"


def test_a_name_that_training_lacks_is_an_error_unless_classes_are_chosen(made, coco):
    made("train", content(TRAIN))
    other = content({1: "dog", 2: "person", 3: "car"})
    other["categories"].append({"id": 4, "name": "zebra"})
    path = made("val", other)
    for stage in ("fit", "validate", "test", "predict"):
        with pytest.raises(DataError, match=r"'zebra', which .*instances_train2017.json lacks") as error:
            coco().setup(stage)
        assert str(path) in str(error.value)
    chosen = coco(classes=["dog", "car"])
    chosen.setup("test")
    assert [chosen.datasets["test"][row]["labels"].tolist() for row in (0, 1)] == [[1], [3]]


def test_categories_of_one_name_are_one_class(made, coco):
    instances = content({1: "fish"}, [[], []])
    instances["categories"] = [{"id": 1, "name": "fish"}, {"id": 0, "name": "fish"}, {"id": 5, "name": "cat"}]
    instances["annotations"] = [
        {"image_id": 10, "category_id": key, "bbox": [1, 1, 9 + key, 9]} for key in (0, 1, 5, 1)
    ]
    made("train", instances)
    made("val", instances)
    for contiguous, expected in ((False, [0, 0, 5, 0]), (True, [0, 0, 1, 0])):
        data = coco(contiguous_labels=contiguous)
        data.setup("fit")
        assert data.datasets["train"][0]["labels"].tolist() == expected
        assert [entry["category_id"] for entry in data.datasets["val"][0]["annotations"]] == expected
        assert [name for name in data.class_names if name != "no class"] == ["fish", "cat"]


@pytest.mark.parametrize("ids", [{-7: "cat", 1: "car"}, {"a": "car"}, {2**40: "car"}, {10**30: "car"}])
def test_ids_that_cannot_be_labels_ask_for_contiguous_ones(ids, made, coco):
    path = made("train", content(ids, [["car"]]))
    made("val", content(ids, [["car"]]))
    with pytest.raises(
        DataError, match=r"cannot be a label; set data\.init_args.contiguous_labels: true"
    ) as error:
        coco().setup("fit")
    assert str(path) in str(error.value)
    data = coco(contiguous_labels=True)
    data.setup("fit")
    assert data.class_names == list(ids.values())
    assert data.datasets["train"][0]["labels"].tolist() == [len(ids) - 1]
    assert coco(classes=["car"], contiguous_labels=True).class_names == ["car"]


def test_without_training_data_the_first_file_numbers_and_that_is_said(made, coco, caplog):
    made("val", content({1: "dog", 2: "car", 3: "person"}))
    with caplog.at_level(logging.WARNING):
        data = coco()
        data.setup("test")
    assert data.class_names == ["no class", "dog", "car", "person"]
    assert "there is no" in caplog.text
    assert "labels are numbered as in" in caplog.text


def test_the_names_of_a_checkpoint_number_data_without_training_file(made, coco, tmp_path):
    """The training machine knows car, person, dog; elsewhere there is only a test file of another order."""
    made("train", content(TRAIN))
    made("val", content(TRAIN))
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    model = Oracle({name: key for key, name in TRAIN.items()})
    fitted = Trainer(default_root_dir=tmp_path, max_steps=0, limit_val_batches=0, **options)
    fitted.fit(model, datamodule=coco())
    fitted.save_checkpoint(tmp_path / "trained.ckpt")
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").unlink()
    made("val", content({1: "dog", 2: "car"}, [["dog", "car"], ["car"]]))
    elsewhere = Trainer(
        default_root_dir=tmp_path / "run", callbacks=[DetectionWriter(draw_score=0)], **options
    )
    arguments = {"datamodule": coco(), "ckpt_path": tmp_path / "trained.ckpt", "weights_only": True}
    (numbers,) = elsewhere.test(model, verbose=False, **arguments)
    assert numbers["test/AP"] == pytest.approx(1)
    made("val", content({1: "dog", 2: "car", 3: "zebra"}, [["dog"]]))
    arguments["datamodule"] = coco()
    with pytest.raises(DataError, match="'zebra', which the model that was loaded lacks"):
        elsewhere.test(model, verbose=False, **arguments)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").unlink()
    arguments["datamodule"] = coco(predict_folder=tmp_path / "coco" / "val2017")
    elsewhere.predict(model, **arguments)
    assert arguments["datamodule"].class_names == ["no class", "car", "person", "dog"]


def test_the_category_minus_one_is_no_class_and_counted(made, coco, caplog):
    """Exporters mark regions to ignore by it; other negative ids are classes."""
    instances = content({-7: "car", -1: "ignore", 3: "dog"}, [["car", "dog"]])
    ignored = {"id": 9, "image_id": 10, "category_id": -1, "bbox": [30, 8, 24, 30]}
    instances["annotations"].insert(1, ignored)
    made("train", instances)
    made("val", instances)
    data = coco(contiguous_labels=True)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert data.class_names == ["car", "dog"]
    assert data.datasets["train"][0]["labels"].tolist() == [0, 1]
    assert [entry["category_id"] for entry in data.datasets["val"][0]["annotations"]] == [0, 1]
    assert caplog.text.count("left out: 1 annotations of category id -1") == 2


def test_no_class_at_all_is_a_sentence(made, coco):
    path = made("train", content(TRAIN))
    said = r"classes: \[\] leaves nothing to learn; .* has car, person, dog"
    with pytest.raises(DataError, match=said) as error:
        coco(classes=[]).setup("fit")
    assert str(path) in str(error.value)


def test_braces_that_name_nothing_are_a_sentence(coco):
    for pattern in ("{spilt}", "{split", "{}"):
        with pytest.raises(MisconfigurationException, match=r"images: .* nothing but \{split\}"):
            coco(images=pattern)
