"""COCO's numbers: those of the record, and those of pycocotools on a results file."""

import json
import time

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lightning_modules.deco.boxes import Detections, detections_of
from lightning_modules.deco.evaluation import STATISTICS, CocoEvaluation
from tests.golden.fill import inputs

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def test_statistics_are_the_recorded_ones(golden):
    case = golden["coco_eval_decoplus"]
    count, queries, classes = len(case["images"]), case["num_queries"], case["num_classes"]
    logits = inputs(f"{case['label']}/logits", (count, queries, classes)) - 4
    boxes = inputs(f"{case['label']}/boxes", (count, queries, 4)).sigmoid()
    jitter = inputs(f"{case['label']}/jitter", (count, queries, 4))
    truth = []
    for i, image in enumerate(case["images"]):
        objects = [entry for entry in case["annotations"] if entry["image_id"] == image["id"]]
        truth.append([{**entry, "category_id": COCO_IDS.index(entry["category_id"])} for entry in objects])
        for j, entry in enumerate(truth[-1]):
            x, y, w, h = entry["bbox"]
            size = torch.tensor([image["width"], image["height"]] * 2)
            centre = torch.tensor([x + w / 2, y + h / 2, w, h]) / size
            for query, lift, scale in ((j, 6, 0.015), (j + 20, 5, 0.05)):
                logits[i, query, entry["category_id"]] += lift
                boxes[i, query] = (centre + scale * jitter[i, query]).clamp(1e-3, 1)
    sizes = torch.tensor([[image["height"], image["width"]] for image in case["images"]])
    evaluation = CocoEvaluation()
    ids = torch.tensor([image["id"] for image in case["images"]])
    evaluation.update(ids, detections_of(logits, boxes, sizes, queries), truth)
    assert list(evaluation.compute().values()) == pytest.approx(case["stats"], abs=1e-6)


# Against pycocotools on files


def random_scenes(count: int, detections: int = 50, seed: int = 0):
    """Ground truth with crowds and empty images, and detections like a half-trained detector's."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(count):
        objects = []
        for _ in range(0 if image % 5 == 4 else int(rng.integers(1, 9))):
            w, h = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            box = [float(v) for v in (*rng.uniform(0, 300, 2), w, h)]
            kind, crowd = int(rng.integers(1, 7)), int(rng.random() < 0.1)
            objects.append({"bbox": box, "area": w * h * 0.7, "iscrowd": crowd, "category_id": kind})
        near = [entry["bbox"] for entry in objects for _ in range(3)]
        boxes = np.array(near + [[*rng.uniform(0, 300, 2), 40, 60]] * (detections - len(near)))
        boxes = boxes * rng.normal(1, 0.06, boxes.shape)
        labels = [entry["category_id"] for entry in objects for _ in range(3)]
        labels = np.array(labels + [1] * (detections - len(labels)))
        labels = np.where(rng.random(detections) < 0.15, rng.integers(1, 7, detections), labels)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        truth.append(objects)
        found.append((np.float32(rng.random(detections)), labels, np.float32(corners)))
    scores, labels, corners = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
    return truth, Detections(scores, labels, corners)


def reference(truth, detections: Detections, folder) -> list[float]:
    """The twelve numbers as a user of pycocotools gets them: two JSON files, one COCOeval."""
    annotations = [{**o, "image_id": image} for image, objects in enumerate(truth, 1) for o in objects]
    annotations = [{**entry, "id": place} for place, entry in enumerate(annotations, 1)]
    instances = {
        "info": {},
        "images": [{"id": image} for image in range(1, len(truth) + 1)],
        "annotations": annotations,
        "categories": [{"id": kind} for kind in range(1, 8)],
    }
    results = []
    for image, (scores, labels, corners) in enumerate(zip(*(p.tolist() for p in detections), strict=True), 1):
        for score, label, (x1, y1, x2, y2) in zip(scores, labels, corners, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "results.json").write_text(json.dumps(results))
    expected = COCO(str(folder / "instances.json"))
    evaluation = COCOeval(expected, expected.loadRes(str(folder / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def test_numbers_and_time_are_those_of_pycocotools_on_files(tmp_path):
    truth, detections = random_scenes(60)
    start = time.process_time()
    expected = reference(truth, detections, tmp_path)
    theirs = time.process_time() - start
    start = time.process_time()
    evaluation = CocoEvaluation()
    for first in range(0, 60, 7):  # uneven batches
        part = Detections(*(values[first : first + 7] for values in detections))
        evaluation.update(torch.arange(first + 1, min(first + 8, 61)), part, truth[first : first + 7])
    found = evaluation.compute()
    ours = time.process_time() - start
    assert list(found.values()) == pytest.approx(expected, abs=1e-9)
    assert 0.02 < found["AP"] < 0.9
    assert list(found) == list(STATISTICS)
    assert ours < 1.3 * theirs + 0.1


def test_an_image_counts_once():
    truth, detections = random_scenes(6)
    once, twice = CocoEvaluation(), CocoEvaluation()
    once.update(torch.arange(6), detections, truth)
    twice.update(torch.arange(6), detections, truth)
    twice.update(torch.tensor([0]), Detections(*(values[3:4] for values in detections)), truth[:1])
    assert twice.compute() == once.compute()
    twice.reset()
    assert twice.compute()["AP"] == -1


def test_crowds_neither_count_as_found_nor_as_missed():
    box = {"bbox": [10.0, 10.0, 50.0, 50.0], "area": 2500.0, "category_id": 1}
    crowd = {"bbox": [100.0, 10.0, 80.0, 80.0], "area": 6400.0, "category_id": 1}
    corners = torch.tensor([[[10.0, 10, 60, 60], [110.0, 20, 130, 40]]])
    detections = Detections(torch.tensor([[0.5, 0.9]]), torch.tensor([[1, 1]]), corners)
    with_crowd, without = CocoEvaluation(), CocoEvaluation()
    with_crowd.update(torch.tensor([1]), detections, [[{**box, "iscrowd": 0}, {**crowd, "iscrowd": 1}]])
    without.update(torch.tensor([1]), detections, [[{**box, "iscrowd": 0}]])
    assert with_crowd.compute()["AP"] == pytest.approx(1)
    assert without.compute()["AP"] == pytest.approx(0.5, abs=0.01)


def test_images_without_objects_are_legal():
    evaluation = CocoEvaluation()
    detections = Detections(torch.rand(1, 3), torch.ones(1, 3, dtype=torch.int64), torch.rand(1, 3, 4))
    evaluation.update(torch.tensor([7]), detections, [[]])
    assert set(evaluation.compute().values()) == {-1.0}
