"""Any COCO file is read, with what is left out counted, or refused in one sentence that names a file."""

import json
import shutil

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from datamodules.coco.module import CocoDataModule
from tests.datamodules.coco.conftest import content
from tests.fuzzing import fuzz, outcome

FIELDS = {
    "images": ("id", "file_name", "width", "height", "coco_url"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "caption"),
    "categories": ("id", "name"),
}
NUMBERS = st.one_of(st.integers(-2, 70), st.floats(), st.sampled_from([2**31, 2**63, 10**40, 1e300, -0.0]))
TEXTS = st.text("01ax./\\ é\x00\ud800-", max_size=6)
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
RUNS = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([48, 64]), VALUES, st.lists(NUMBERS, max_size=2)),
        "counts": st.one_of(
            st.just([72, 3000]), st.lists(NUMBERS, max_size=4), st.text("0129PQ`o~", max_size=9)
        ),
    }
)
ANYTHING = st.one_of(
    VALUES,
    st.lists(VALUES, max_size=4),
    st.lists(NUMBERS, min_size=4, max_size=4),
    st.lists(st.lists(NUMBERS, max_size=8), max_size=3),
    st.dictionaries(TEXTS, VALUES, max_size=2),
    RUNS,
)
ENTRY = st.sampled_from([(kind, field) for kind, fields in FIELDS.items() for field in fields])
CHANGES = st.lists(st.tuples(ENTRY, st.integers(0, 3), ANYTHING), min_size=1, max_size=3)
GONE = "this field is left out"


def changed(changes) -> dict:
    """`content` with outlines, and with some fields changed, or whole lists and entries of them."""
    instances = content({1: "car", 2: "person", 3: "dog"})
    for entry in instances["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    for (kind, field), row, value in changes:
        listed = instances[kind]
        if isinstance(listed, list) and isinstance(listed[row % len(listed)], dict):
            listed[row % len(listed)][field] = value
            if value == GONE:
                del listed[row % len(listed)][field]
    return instances


def read(root) -> tuple[CocoDataModule, list[dict]]:
    """All that the data module makes of it, in training and in evaluation."""
    data = CocoDataModule(root=root, train_split="val2017", masks=True, num_workers=0)
    data.setup("fit")
    return data, [dataset[row] for dataset in data.datasets.values() for row in range(len(dataset))]


def check(root) -> None:
    shutil.rmtree(root / "annotations" / ".index", ignore_errors=True)
    result = outcome(lambda: read(root), "val2017")
    if not result.read:
        return
    data, samples = result.value
    dataset = data.datasets["train"]
    census = dataset.census()
    objects = sum(len(sample["labels"]) for sample in samples[: len(dataset)])
    unknown = any(0 in (int(image["width"]), int(image["height"])) for image in dataset.annotations.images)
    assert objects == census.objects or (unknown and objects < census.objects)
    assert census.objects + census.crowds + census.empty <= len(dataset.annotations.objects)
    for sample in samples:
        assert sample["image"].size == (64, 48)
        boxes, labels = sample["boxes"].numpy(), sample["labels"].tolist()
        assert np.isfinite(boxes).all()
        assert ((boxes >= 0) & (boxes <= (64, 48, 64, 48))).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert sample["masks"].shape == (len(labels), 48, 64)
        assert all(data.class_names[label] in ("car", "person", "dog") or label >= 0 for label in labels)
    for sample in samples[len(dataset) :]:
        instances = [entry for entry in sample["annotations"] if not entry["iscrowd"]]
        assert len(instances) == len(sample["labels"])
        assert all(entry["area"] >= 0 for entry in sample["annotations"])


@fuzz(120)
@given(CHANGES)
@example([(("annotations", "bbox"), 0, GONE), (("images", "width"), 0, GONE)])
@example([(("images", "file_name"), 0, "../../../secret.png")])
@example([(("annotations", "segmentation"), 0, {"size": [10**6, 10**6], "counts": "PPPP"})])
def test_values_of_any_kind(made, changes):
    path = made("val", content({1: "car", 2: "person", 3: "dog"}))
    path.write_text(json.dumps(changed(changes)))
    check(path.parent.parent)


@fuzz(60)
@given(st.data())
def test_files_of_any_kind(made, data):
    """Cut, with bytes changed, and with other things in the place of the lists."""
    path = made("val", content({1: "car", 2: "person", 3: "dog"}))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        instances = json.loads(raw)
        instances[data.draw(st.sampled_from(list(FIELDS)))] = data.draw(ANYTHING)
        raw = json.dumps(instances).encode()
    else:
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
            raw[place] = data.draw(st.integers(0, 255))
        raw = raw[: data.draw(st.integers(0, 2 * len(raw)))]
    path.write_bytes(raw)
    check(path.parent.parent)
