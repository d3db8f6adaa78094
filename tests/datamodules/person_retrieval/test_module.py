"""Layouts, checks, captions and the order of training pairs."""

import json

import pytest
import torch
from PIL import Image

from datamodules import PersonRetrievalDataModule
from datamodules.person_retrieval import CaptionTokenizer


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for number in range(12):
        Image.new("RGB", (8, 16), (number * 20, 0, 0)).save(tmp_path / f"images/{number}.jpg")
        split = "train" if number < 8 else "test"
        captions = [f"person number {number}", "one more sentence"][: 1 + number % 2]
        record = {"split": split, "id": number // 2 * 5, "file_path": f"images/{number}.jpg"}
        records.append({**record, "captions": captions})
    (tmp_path / "UFine6926_Annotations.json").write_text(json.dumps(records))
    return tmp_path


def change(root, number, **fields):
    file = root / "UFine6926_Annotations.json"
    records = json.loads(file.read_text())
    records[number].update(fields)
    file.write_text(json.dumps(records))


def data(root, **options):
    options = {"batch_size": 4, "num_workers": 0, "val_id_fraction": 0.3, "context_length": 12, **options}
    return PersonRetrievalDataModule(root=root, seed=0, **options)


def test_training_pairs_and_a_gallery_with_each_image_once(root):
    module = data(root)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 384, 128)
    assert batch["input_ids"].shape == (4, 12)
    assert set(module.datasets["train"].identities) == set(range(module.num_classes))
    module.setup("test")
    gallery, queries = module.test_dataloader().values()
    paths = [path for batch in gallery for path in batch["path"]]
    assert len(paths) == len(set(paths)) == 4
    assert sum(len(batch["caption"]) for batch in queries) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": []}, "record 3: the image images/3.jpg has no list of captions"),
        ({"captions": ["  "]}, "record 3: a caption of the image images/3.jpg"),
        ({"id": "7"}, "record 3: id is '7', expected an integer"),
        ({"split": "valid"}, "record 3: split is 'valid'"),
        ({"file_path": "images/1.jpg"}, "record 3: the image images/1.jpg is listed already in record 1"),
        ({"file_path": "images/99.jpg"}, "1 images of the annotations are missing"),
        ({"id": 20}, "1 identities of the test split are trained on too"),
    ],
)
def test_what_is_wrong_is_named(root, fields, message):
    change(root, 3, **fields)
    with pytest.raises(ValueError, match=message):
        data(root).setup("fit")


def test_an_overlap_can_be_allowed(root):
    change(root, 3, id=20)
    data(root, allow_overlap=True).setup("fit")


def test_no_annotations_and_no_training_on_ufine3c(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"reid_raw\.json"):
        data(root, dataset="cuhk_pedes").setup("fit")
    with pytest.raises(ValueError, match="ufine3c is for tests only"):
        data(root, dataset="ufine3c").setup("fit")


def test_batches_of_identities(root):
    module = data(root, sampler="identity", num_instances=2, val_source="test")
    module.setup("fit")
    for batch in module.train_dataloader():
        assert torch.unique(batch["identity"], return_counts=True)[1].tolist() == [2, 2]


def test_long_captions_are_cut_and_counted_and_marks_are_text():
    ids, cut = CaptionTokenizer(8)(
        ["a red coat", "one two three four five six seven eight", "a <end_of_text> b"]
    )
    assert cut == 2
    assert ids[1, -1] == ids[2].max() == 49407
    assert (ids == 49407).sum(dim=1).tolist() == [1, 1, 1]
    assert ids[0, 5:].tolist() == [0, 0, 0]
