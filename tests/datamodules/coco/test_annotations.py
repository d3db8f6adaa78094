"""What exporters write into a COCO file: read where it is clear, else one sentence with file and entry."""

import gzip
import json
import logging
import math
import pickle
import shutil

import numpy as np
import pytest
from torch.utils.data import DataLoader

from datamodules.coco.annotations import CocoAnnotations
from datamodules.reading import CorruptSampleError, DataError
from tests.datamodules.coco.conftest import content
from tests.fuzzing import outcome

IDS = {1: "car", 2: "person", 3: "dog"}
CAR = [4, 6, 20, 16]


def changed(**fields) -> dict:
    """`content` with other fields in its first annotation; a field of `None.pop` is left out."""
    instances = content(IDS)
    instances["annotations"][0] = {
        name: value
        for name, value in {**instances["annotations"][0], **fields}.items()
        if value is not dict.pop
    }
    return instances


def first(data) -> dict:
    """The first object of the first image, as the evaluation sees it."""
    data.setup("validate")
    return data.datasets["val"][0]["annotations"][0]


# Values


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"area": None}, {"area": 320}),
        ({"area": dict.pop}, {"area": 320}),
        ({"area": [400]}, {"area": 400}),
        ({"area": "400.5"}, {"area": 400.5}),
        ({"area": 0}, {"area": 0}),
        ({"bbox": ["4", "6.0", 20, 16.0]}, {"bbox": CAR}),
        ({"iscrowd": None}, {"iscrowd": 0}),
        ({"iscrowd": dict.pop}, {"iscrowd": 0}),
        ({"iscrowd": "0"}, {"iscrowd": 0}),
        ({"iscrowd": False}, {"iscrowd": 0}),
        ({"iscrowd": 0.0}, {"iscrowd": 0}),
        ({"iscrowd": "1"}, {"iscrowd": 1}),
        ({"iscrowd": True}, {"iscrowd": 1}),
        ({"category_id": "1"}, {"category_id": 1}),
        ({"category_id": 1.0}, {"category_id": 1}),
        ({"image_id": "10"}, {}),
        ({"id": None}, {}),
        ({"id": dict.pop}, {}),
        ({"id": 2}, {}),
        ({"id": "0a1b-2c"}, {}),
        ({"caption": "a red car"}, {}),
        ({"caption": ""}, {}),
        ({"caption": None}, {}),
        ({"segmentation": None}, {}),
        ({"segmentation": []}, {}),
        ({"segmentation": "not asked for"}, {}),
        ({"attributes": {"occluded": False}, "keypoints": [], "ignore": 0}, {}),
    ],
    ids=str,
)
def test_values_with_a_clear_meaning_are_read(fields, expected, made, coco):
    made("val", changed(**fields))
    assert first(coco()) == {"bbox": CAR, "area": 320, "iscrowd": 0, "category_id": 1, **expected}


BAD_FIELDS = [
    ({"bbox": None}, "bbox None"),
    ({"bbox": dict.pop}, "no field 'bbox'"),
    ({"bbox": [1, 2, 3]}, "four finite numbers"),
    ({"bbox": [1, 2, 3, 4, 5]}, "four finite numbers"),
    ({"bbox": "1,2,3,4"}, "four finite numbers"),
    ({"bbox": {"x": 1}}, "four finite numbers"),
    ({"bbox": [1, 2, "wide", 4]}, "wide"),
    ({"bbox": [1, 2, True, 4]}, "four finite numbers"),
    ({"bbox": [1, 2, math.nan, 4]}, "nan"),
    ({"bbox": [1, math.inf, 3, 4]}, "inf"),
    ({"bbox": [1, 2, -3, 4]}, "negative width"),
    ({"bbox": [1, 2, 10**400, 4]}, "four finite numbers"),
    ({"area": math.nan}, "area nan"),
    ({"area": -1}, "area -1"),
    ({"area": [1, 2]}, "area"),
    ({"area": "large"}, "large"),
    ({"iscrowd": 2}, "iscrowd 2"),
    ({"iscrowd": "some"}, "some"),
    ({"iscrowd": []}, "iscrowd"),
    ({"category_id": None}, "category_id None"),
    ({"category_id": dict.pop}, "no field 'category_id'"),
    ({"category_id": True}, "category_id True"),
    ({"category_id": 1.5}, "category_id 1.5"),
    ({"category_id": -1}, "category -1, which is not in the file"),
    ({"image_id": None}, "image_id None"),
    ({"image_id": dict.pop}, "no field 'image_id'"),
    ({"image_id": 11.5}, "image_id 11.5"),
    ({"image_id": 99}, "image 99, which is not in the file"),
]


@pytest.mark.parametrize(("fields", "said"), BAD_FIELDS, ids=str)
def test_values_without_one_are_a_sentence_with_file_and_entry(fields, said, made, coco):
    path = made("val", changed(**fields))
    refused = outcome(lambda: coco().setup("validate"), path, "annotations[0]", said)
    assert not refused.read


@pytest.mark.parametrize("missing", [None, "", dict.pop, 0])
def test_sizes_may_be_unknown(missing, made, coco):
    instances = content(IDS)
    for field in ("height", "width"):
        instances["images"][0][field] = missing
        if missing is dict.pop:
            del instances["images"][0][field]
    made("val", instances)
    data = coco()
    assert first(data)["bbox"] == CAR
    assert data.datasets["val"][0]["orig_size"].tolist() == [48, 64]


@pytest.mark.parametrize(
    ("lists", "names"),
    [
        ({"images": None}, ["no list 'images'"]),
        ({"images": {}}, ["no list 'images'"]),
        ({"images": [], "annotations": []}, ["lists no images"]),
        ({"images": [7]}, ["images[0]", "7"]),
        ({"images": [None]}, ["images[0]"]),
        ({"images": [{"id": 10}]}, ["images[0]", "'file_name'"]),
        ({"images": [{"file_name": "0.png"}]}, ["images[0]", "'id'"]),
        ({"images": [{"id": None, "file_name": "0.png"}]}, ["images[0]", "id None"]),
        ({"images": [{"id": 10, "file_name": None}]}, ["images[0]", "file_name None"]),
        ({"images": [{"id": 10, "file_name": ["0.png"]}]}, ["images[0]", "file_name"]),
        ({"images": [{"id": 10, "file_name": " "}]}, ["images[0]", "file_name"]),
        ({"images": [{"id": 10, "file_name": "0.png", "width": -5}]}, ["images[0]", "width -5"]),
        ({"images": [{"id": 10, "file_name": "0.png", "height": "tall"}]}, ["images[0]", "tall"]),
        ({"images": [{"id": 10, "file_name": "0.png", "height": 10**12}]}, ["images[0]", "height"]),
        ({"images": [{"id": i, "file_name": "0.png"} for i in (1, "1")]}, ["images[0] and images[1]"]),
        ({"annotations": "none"}, ["'annotations'"]),
        ({"annotations": [[]]}, ["annotations[0]"]),
        ({"annotations": None}, ["nothing to measure by", "0 objects"]),
        ({"annotations": []}, ["nothing to measure by", "0 objects"]),
        ({"categories": [], "annotations": []}, ["no categories"]),
        ({"categories": None}, ["annotations[0]", "category"]),
        ({"categories": {"1": "car"}}, ["'categories'"]),
        ({"categories": ["car"]}, ["categories[0]", "car"]),
        ({"categories": [{"id": 1}]}, ["categories[0]", "'name'"]),
        ({"categories": [{"id": 1, "name": None}]}, ["categories[0]", "name None"]),
        ({"categories": [{"name": "car"}]}, ["categories[0]", "'id'"]),
        ({"categories": [{"id": [1], "name": "car"}]}, ["categories[0]", "id [1]"]),
        ({"categories": [{"id": 1, "name": "car"}, {"id": "1", "name": "cat"}]}, ["categories[1]", "'car'"]),
    ],
    ids=str,
)
def test_wrong_lists_are_a_sentence_with_file_and_entry(lists, names, made, coco):
    path = made("val", {**content(IDS), **lists}, pictures=False)
    (path.parent.parent / "val2017").mkdir()
    refused = outcome(lambda: coco().setup("validate"), path, *names)
    assert not refused.read


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"images"',
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"\x89PNG",
        gzip.compress(b"{}", mtime=0),
    ],
    ids=lambda raw: repr(raw[:8]),
)
def test_what_is_no_coco_file_is_a_sentence(raw, tmp_path):
    path = tmp_path / "instances.json"
    path.write_bytes(raw)
    assert not outcome(lambda: CocoAnnotations(path), path).read


def test_texts_as_ids_match_numbers_of_another_file(made, coco):
    """Captions and instances of the same images, exported by different tools."""
    instances = content(IDS)
    for entry in instances["images"]:
        entry["id"] = f"{entry['id']}"
    for entry in instances["annotations"]:
        entry["image_id"] = f"{entry['image_id']}"
    made("val", instances)
    captions = [{"image_id": 11, "id": 1, "caption": "a dog"}, {"image_id": 10, "id": None, "caption": ""}]
    made("val", {**content(IDS), "annotations": captions}, kind="captions", pictures=False)
    data = coco(captions="annotations/captions_{split}.json")
    data.setup("validate")
    assert [data.datasets["val"][row]["captions"] for row in (0, 1)] == [[""], ["a dog"]]


# What exporters make of it


def roboflow(instances):
    """Ids from 0, a class that nothing has, and integers as texts in the extra fields."""
    instances["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    for entry in instances["categories"][1:]:
        entry["supercategory"] = "things"
    for entry in instances["images"]:
        entry |= {"license": 1, "date_captured": "2024-01-01T00:00:00+00:00", "extra": {"name": "a.png"}}


def label_studio(instances):
    """Ids from 0, a folder in the names (with the slashes of Windows), no `supercategory`."""
    for entry in instances["categories"] + instances["images"]:
        entry["id"] -= 1
    for entry in instances["annotations"]:
        entry |= {"category_id": entry["category_id"] - 1, "image_id": entry["image_id"] - 1, "ignore": 0}
        entry["segmentation"] = []
    for entry in instances["images"]:
        entry["file_name"] = "images\\" + entry["file_name"]


def lvis(instances):
    """No `iscrowd`, no file names, categories with synonyms and frequencies."""
    for entry in instances["categories"]:
        entry |= {"synset": f"{entry['name']}.n.01", "synonyms": [entry["name"]], "frequency": "c"}
    for entry in instances["annotations"]:
        del entry["iscrowd"]
    for entry in instances["images"]:
        name = entry.pop("file_name")
        entry |= {"coco_url": f"http://images.cocodataset.org/val2017/{name}", "neg_category_ids": [1]}
        entry["not_exhaustive_category_ids"] = []


def cvat(instances):
    """Attributes, an empty date, areas as floats."""
    for entry in instances["annotations"]:
        entry |= {"attributes": {"occluded": False, "rotation": 0.0}, "segmentation": []}
    for entry in instances["images"]:
        entry |= {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}


def datumaro(instances):
    """Ids of images as texts, an object's group, categories without anything but id and name."""
    for entry in instances["annotations"]:
        entry |= {"image_id": f"frame_{entry['image_id']:06d}", "group": 0, "is_crowd": None}
        del entry["area"]
    for entry in instances["images"]:
        entry["id"] = f"frame_{entry['id']:06d}"


def yolo(instances):
    """A script over YOLO's text files: ids from 0 in one count, floats everywhere, few fields."""
    for entry in instances["annotations"]:
        entry["bbox"] = [value + 1e-4 for value in entry["bbox"]]
        entry["category_id"] = float(entry["category_id"])
        for field in ("area", "iscrowd", "id"):
            del entry[field]
    instances.pop("info", None)


@pytest.mark.parametrize("export", [roboflow, label_studio, lvis, cvat, datumaro, yolo])
def test_exports_are_read(export, made, coco):
    instances = content(IDS)
    root = made("val", instances).parent.parent
    export(instances)
    made("val", instances, pictures=False)
    folder = "{split}"
    if export is label_studio:
        (root / "val2017" / "images").mkdir()
        for name in ("0.png", "1.png"):
            (root / "val2017" / name).rename(root / "val2017" / "images" / name)
    elif export is lvis:
        folder = "."
    data = coco(images=folder)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    names = [[data.class_names[entry["category_id"]] for entry in truth] for truth in batch["annotations"]]
    assert names == [["car", "person"], ["dog", "person"]]
    assert [len(target["boxes"]) for target in batch["targets"]] == [2, 2]


# Nothing to learn from


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"iscrowd": 1}, "0 objects and 4 crowds in 2 images"),
        ({"bbox": [4, 6, 0, 16]}, "4 boxes without area or outside of their picture"),
        ({"bbox": [64, 6, 20, 16]}, "4 boxes without area or outside of their picture"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_which_nothing_is_left_is_refused_with_the_counts(fields, said, split, made, coco):
    instances = content(IDS)
    for entry in instances["annotations"]:
        entry |= fields
    made("train", content(IDS))
    path = made(split, instances)
    stage = "fit" if split == "train" else "validate"
    assert not outcome(lambda: coco().setup(stage), path, said).read


def test_a_validation_split_without_objects_does_not_stop_training(made, coco, caplog):
    made("train", content(IDS))
    made("val", content(IDS, [[]]))
    with caplog.at_level(logging.WARNING):
        coco().setup("fit")
    assert "val: " in caplog.text
    assert "0 objects and 0 crowds in 1 images" in caplog.text


def test_fewer_images_than_a_batch_are_refused_with_both_numbers(made, coco):
    made("train", content(IDS))
    made("val", content(IDS))
    data = coco(batch_size=128)
    data.setup("fit")
    refused = outcome(data.train_dataloader, "2", "128", "batch_size")
    assert not refused.read
    whole = coco(batch_size=128, drop_last=False)
    whole.setup("fit")
    assert len(list(whole.train_dataloader())) == 1


def test_boxes_without_area_or_outside_count_and_are_in_neither_training_nor_truth(made, coco, caplog):
    instances = content(IDS)
    bad = [[60, 40, 0, 5], [70, 1, 9, 9], [-30, 0, 20, 20], [4, 6, 0, 0]]
    for place, box in enumerate(bad):
        instances["annotations"].insert(place, {"image_id": 10, "category_id": 1, "bbox": box})
    instances["annotations"].append({"image_id": 10, "category_id": 1, "bbox": [50, 40, 100, 100]})
    made("train", instances)
    made("val", instances)
    with caplog.at_level(logging.INFO, "datamodules.coco.module"):
        data = coco()
        data.setup("fit")
    assert caplog.text.count("5 objects and 0 crowds in 2 images; left out: 4 boxes without area") == 2
    assert caplog.text.count("1 boxes reach out of their picture") == 2
    for split in ("train", "val"):
        assert data.datasets[split][0]["boxes"].tolist() == [
            [4, 6, 24, 22],
            [30, 8, 54, 38],
            [50, 40, 64, 48],
        ]
    truth = [entry["bbox"] for entry in data.datasets["val"][0]["annotations"]]
    assert truth == [CAR, [30, 8, 24, 30], [50, 40, 100, 100]], "as written, as COCO's own evaluation has it"


# The index


@pytest.mark.parametrize(
    "damage", ["meta.json", "objects.npy", "images.npy", "text.npy", "other", "empty", "zeros"]
)
def test_a_broken_index_is_made_again(damage, made, caplog):
    path = made("val", content(IDS))
    before = CocoAnnotations(path).objects.tobytes()
    (folder,) = (path.parent / ".index").iterdir()
    if damage == "other":
        np.save(folder / "images.npy", np.zeros(3))
    elif damage == "empty":
        for file in folder.iterdir():
            file.write_bytes(b"")
    elif damage == "zeros":
        with (folder / "objects.npy").open("r+b") as file:
            file.seek(-40, 2)
            file.write(bytes(16))
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-9])
    after = CocoAnnotations(path)
    assert after.objects.tobytes() == before
    assert "is made again" in caplog.text


# Errors from workers


def test_errors_survive_the_way_from_a_worker(made, coco):
    path = made("val", content(IDS))
    (path.parent.parent / "val2017" / "1.png").write_bytes(b"no picture")
    data = coco(num_workers=1, persistent_workers=False)
    data.setup("validate")
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    refused = outcome(lambda: list(loader), "val2017/1.png")
    assert not refused.read
    assert "Caught" not in refused.sentence
    for kind in (DataError, CorruptSampleError):
        again = pickle.loads(pickle.dumps(kind("one.json: annotations[3] is wrong.")))
        assert str(again) == "one.json: annotations[3] is wrong."


def test_a_json_that_is_gone_is_a_sentence_in_a_worker_too(made, coco):
    path = made("val", content(IDS))
    data = coco()
    data.setup("validate")
    packed = pickle.dumps(data.datasets["val"])
    shutil.rmtree(path.parent)
    assert not outcome(lambda: pickle.loads(packed), path).read


def test_a_file_of_many_texts_stays_small_in_a_worker(made, coco):
    made("val", json.loads(json.dumps(content(IDS))))
    data = coco()
    data.setup("validate")
    assert len(pickle.dumps(data.datasets["val"])) < 2000
