"""Instances with a detector's boxes: what batches hold, LVIS's lists, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from datamodules import InstancePromptsDataModule
from datamodules.reading import DataError


def opened(root, **options):
    data = InstancePromptsDataModule(root=root, image_size=64, num_workers=0, **options)
    data.setup("test")
    return data


@pytest.fixture
def own(instances, tmp_path):
    """A copy to damage; `change(edit)` rewrites the annotation file, `boxes(list)` the detections."""
    root = tmp_path / "coco"
    shutil.copytree(instances, root, ignore=shutil.ignore_patterns(".index"))
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())

    def change(edit):
        edit(content)
        path.write_text(json.dumps(content))

    def boxes(edit):
        listed = json.loads((root / "detections_val2017.json").read_text())
        (root / "found.json").write_text(json.dumps(edit(listed)))
        return root / "found.json"

    return root, content, change, boxes


def test_ground_truth_boxes_without_detections(instances):
    batches = list(opened(instances).test_dataloader())
    assert [batch["image_id"] for batch in batches] == [[0], [1]]
    for batch in batches:
        masks, boxes = batch["truth"][0], batch["boxes"][0]
        assert len(masks) == len(boxes) == len(batch["annotations"][0])
        assert set(batch["scores"][0].tolist()) == {1.0}
        for mask, (x1, y1, x2, y2), entry in zip(masks.numpy(), boxes, batch["annotations"][0], strict=True):
            assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask)
            rows, columns = np.argwhere(mask).T
            assert abs(columns.min() - x1) <= 1
            assert abs(rows.max() + 1 - y2) <= 1
            assert x2 > x1
            assert y2 > y1


def test_detections_are_grouped_and_clipped(own):
    root, content, _, boxes = own
    image, other = content["images"][:2]
    key, category = image["id"], content["categories"][1]["id"]

    def edit(_):
        box = {"image_id": key, "category_id": category, "score": 0.7}
        return [
            {**box, "bbox": [-5, -5, 20, 15]},
            {**box, "bbox": [image["width"] - 3, 2, 10, 10], "image_id": str(key)},
            {**box, "bbox": [500, 500, 5, 5]},
        ]

    batches = {batch["id"][0]: batch for batch in opened(root, detections=boxes(edit)).test_dataloader()}
    batch = batches[str(key)]
    assert batch["boxes"][0].tolist() == [[0, 0, 15, 10], [image["width"] - 3, 2, image["width"], 12]]
    assert batch["categories"][0].tolist() == [1, 1]
    assert batch["scores"][0].tolist() == [0.7, 0.7]
    assert batches[str(other["id"])]["boxes"][0].shape == (0, 4)


BAD = {
    "image_id": ({"image_id": 4}, "is of image 4, which the annotation file does not have"),
    "category": ({"category_id": 99}, "has the category 99, which the annotation file does not have"),
    "bbox": ({"bbox": [1, 2, -3, 4]}, r"has the bbox \[1, 2, -3, 4\]; four finite numbers"),
    "score": ({"score": float("nan")}, "has the score nan; a finite number is needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_detections(own, case):
    root, _, _, boxes = own
    change, message = BAD[case]
    path = boxes(lambda listed: [listed[0], {**listed[1], **change}])
    with pytest.raises(DataError, match=rf"found\.json: detection \[1\] {message}"):
        opened(root, detections=path)


def test_detections_must_be_there_and_a_list(own, tmp_path):
    root, _, _, boxes = own
    with pytest.raises(FileNotFoundError, match=r"detections: there is no file .*none\.json"):
        opened(root, detections=tmp_path / "none.json")
    with pytest.raises(DataError, match=r"found\.json is no list of detections"):
        opened(root, detections=boxes(lambda listed: {"annotations": listed}))
    with pytest.raises(DataError, match=r"\[0\] has no field 'score'"):
        opened(root, detections=boxes(lambda listed: [{k: v for k, v in listed[0].items() if k != "score"}]))


def test_lvis_lists_and_names(own):
    root, content, change, _ = own
    ids = [entry["id"] for entry in content["categories"]]

    def federate(lvis):
        for place, image in enumerate(lvis["images"]):
            image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
            image["neg_category_ids"], image["not_exhaustive_category_ids"] = [ids[2]], ids[:place]

    change(federate)
    batches = list(opened(root, images=".").test_dataloader())
    assert [batch["negative"] for batch in batches] == [[[2]], [[2]]]
    assert [batch["not_exhaustive"] for batch in batches] == [[[]], [[0]]]
    change(lambda lvis: lvis["images"][1].update(neg_category_ids=[12345]))
    with pytest.raises(DataError, match=r"images\[1\] has no lists of known ids neg_category_ids"):
        opened(root, images=".")


def test_a_polygon_of_two_points_is_no_box(own):
    """pycocotools takes four numbers for a box."""
    root, content, change, _ = own
    before = next(iter(opened(root).test_dataloader()))["truth"][0]
    entry = next(e for e in content["annotations"] if e["image_id"] == content["images"][0]["id"])
    change(lambda _: entry["segmentation"].append([0.0, 0.0, 30.0, 30.0]))
    after = next(iter(opened(root).test_dataloader()))["truth"][0]
    assert np.array_equal(before.numpy(), after.numpy())


def test_the_smallest_ids(own):
    root, content, change, _ = own
    change(lambda coco: coco["images"].reverse())
    dataset = opened(root, max_images=1).datasets["test"]
    assert len(dataset) == 1
    assert dataset[0]["id"] == str(min(image["id"] for image in content["images"]))


def test_it_is_not_for_training(instances):
    data = InstancePromptsDataModule(root=instances)
    with pytest.raises(DataError, match="is for validate, test and predict; train on SA1BDataModule"):
        data.train_dataloader()
