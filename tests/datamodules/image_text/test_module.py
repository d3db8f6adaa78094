"""Every layout, its faults, the order of shards, evaluation sets, and the drawn sample."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules import ImageTextDataModule, ImageTransforms, RetrievalSet, ZeroShotSet
from datamodules.image_text.annotations import Strings
from datamodules.image_text.pairs import expand_braces
from datamodules.reading import CorruptSampleError, DataError
from datamodules.samples.scenes import captions_of, write_scenes

SMALL = ImageTransforms(image_size=16, augmentation="none")
SETS = {
    "zero_shot": [ZeroShotSet("things", Path("zeroshot"), Path("zeroshot.json"))],
    "retrieval": [RetrievalSet("drawn", Path("scenes_karpathy.json"), Path("test"))],
}


def module(root, **options):
    defaults = {"batch_size": 4, "num_workers": 0, "context_length": 24, "transforms": SMALL}
    return ImageTextDataModule(root=root, seed=0, **{**defaults, **options})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, 24, 24, shards=3)
    return root


@pytest.fixture
def lists(tmp_path):
    """The same three pictures in each layout of a list."""
    (tmp_path / "pictures").mkdir()
    texts = [["a red one", "again red"], ["a green one"], ["a blue one"]]
    for number in range(3):
        Image.new("RGB", (20, 20), (number * 90, 0, 0)).save(tmp_path / f"pictures/{number}.jpg")
    lines = [f"pictures/{number}.jpg\t{text[0]}" for number, text in enumerate(texts)]
    (tmp_path / "list.csv").write_text("\n".join(["filepath\ttitle", *lines]))
    lines = [
        json.dumps({"filename": f"pictures/{number}.jpg", "caption": text})
        for number, text in enumerate(texts)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(["", *lines]))
    images = [
        {
            "filepath": "pictures",
            "filename": f"{number}.jpg",
            "split": "restval" if number else "train",
            "sentences": [{"raw": each} for each in text],
        }
        for number, text in enumerate(texts)
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    flat = [{"image": f"pictures/{number}.jpg", "caption": text} for number, text in enumerate(texts)]
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    coco = {
        "images": [{"id": 7 + number, "file_name": f"pictures/{number}.jpg"} for number in range(3)],
        "annotations": [
            {"id": 10 * number + place, "image_id": 7 + number, "caption": each}
            for number, text in enumerate(texts)
            for place, each in enumerate(text)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return tmp_path


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def jpeg():
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "JPEG")
    return stream.getvalue()


LAYOUTS = {
    "csv": {"train": "list.csv"},
    "jsonl": {"train": "list.jsonl", "image_key": "filename", "caption_key": "caption"},
    "karpathy": {"train": "karpathy.json", "splits": ("train", "restval")},
    "coco": {"train": "coco.json"},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "flat"])
def test_each_layout_gives_the_same_pairs(lists, layout):
    options = LAYOUTS.get(layout, {"train": "flat.json"})
    data = module(lists, format="karpathy" if layout == "flat" else layout, batch_size=3, **options)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    order = batch["index"].argsort()
    assert [Path(batch["path"][place]).name for place in order] == ["0.jpg", "1.jpg", "2.jpg"]
    ids, _ = data.tokenize(["a red one", "a green one", "a blue one"])
    assert torch.equal(batch["input_ids"][order], ids)
    assert batch["image"].shape == (3, 3, 16, 16)


PUBLISHED = {  # an entry of each as the files of the splits have them
    "coco": {
        "filepath": "val2014",
        "sentids": [770337, 771687],
        "filename": "COCO_val2014_000000391895.jpg",
        "imgid": 0,
        "split": "restval",
        "sentences": [
            {"tokens": ["a", "man"], "raw": "A man on a moped. ", "imgid": 0, "sentid": 770337},
            {"tokens": ["man"], "raw": "Man riding a motor bike.\n", "imgid": 0, "sentid": 771687},
        ],
        "cocoid": 391895,
    },
    "flickr30k": {
        "sentids": [0],
        "imgid": 0,
        "sentences": [{"tokens": ["two"], "raw": "Two friends hang out.", "imgid": 0, "sentid": 0}],
        "split": "train",
        "filename": "1000092795.jpg",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_karpathys_splits_as_they_are_published(name, tmp_path):
    entry = PUBLISHED[name]
    test = {**entry, "split": "test", "imgid": 1}
    content = {"images": [entry, test, {**test, "split": "val"}], "dataset": name}
    (tmp_path / f"dataset_{name}.json").write_text(json.dumps(content))
    picture = tmp_path / "pictures" / entry.get("filepath", "") / entry["filename"]
    picture.parent.mkdir(parents=True)
    picture.write_bytes(jpeg())
    file, folder = Path(f"dataset_{name}.json"), Path("pictures")
    data = module(
        tmp_path,
        format="karpathy",
        train=str(file),
        images=folder,
        splits=("train", "restval"),
        batch_size=1,
        retrieval=[RetrievalSet("five", file, folder)],
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["path"] == [str(picture)]
    data.setup("test")
    said = [sentence["raw"].strip() for sentence in entry["sentences"]]
    loaders = data.test_dataloader()
    assert [text for part in loaders["test_five_queries"] for text in part["caption"]] == said
    assert [path for part in loaders["test_five_gallery"] for path in part["path"]] == [str(picture)]


def test_captions_of_another_tokenizer_are_refused(drawn):
    data = module(drawn)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(vocabulary_size=100))
    with pytest.raises(
        MisconfigurationException, match=r"byte pairs, 49408 tokens, and the model's .* has 100"
    ):
        data.setup("fit")


def test_a_random_caption_is_a_function_of_the_epoch(lists):
    data = module(lists, format="coco", train="coco.json", captions="random", batch_size=3)
    data.setup("fit")

    def first(epoch):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        return batch["input_ids"][batch["index"] == 0].tolist()

    found = [first(epoch) for epoch in range(8)]
    assert found == [first(epoch) for epoch in range(8)]
    assert len({str(each) for each in found}) == 2


def test_shards_are_read_once_an_epoch_and_resumed_within(drawn):
    data = module(drawn, train="train/{00000..00002}.tar")
    data.prepare_data()
    assert len(list((drawn / "train" / ".index").iterdir())) == 3
    data.setup("fit")
    whole = list(data.train_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in whole]).tolist()) == list(range(24))
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == 4
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_ranks_have_equally_many_batches_of_their_own(drawn, monkeypatch):
    seen = []
    for rank in range(2):
        data = module(drawn, train="train", batch_size=5)
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (rank, 2))
        data.setup("fit")
        seen.append([batch["index"].tolist() for batch in data.train_dataloader()])
    assert [len(batches) for batches in seen] == [2, 2]
    every = [index for batches in seen for batch in batches for index in batch]
    assert len(set(every)) == len(every) == 20


def test_broken_samples_are_left_out_and_counted(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(20):
            add(tar, f"{number:02d}.jpg", b"no picture" if number == 3 else jpeg())
            add(tar, f"{number:02d}.txt", b" " if number == 5 else b"a picture with a long caption " * 9)
        add(tar, "30.jpg", jpeg())  # without caption
        add(tar, "31.txt", b"without picture")
    data = module(tmp_path, train="*.tar", on_error="skip", batch_size=20, max_skip_fraction=0.1)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(batch["image"]) == 20
    assert {3, 5}.isdisjoint(batch["index"].tolist())
    said = caplog.text
    assert "2 samples that lack a member are left out" in said
    assert "the caption of 05 of" in said
    assert "2 unreadable samples were replaced" in said
    assert "20 captions are longer than context_length: 24 and were cut" in said
    strict = module(tmp_path, train="*.tar", on_error="skip", batch_size=20, max_skip_fraction=0.05)
    strict.setup("fit")
    with pytest.raises(
        DataError, match=r"2 of \d+ samples cannot be read, more than max_skip_fraction: 0.05"
    ):
        list(strict.train_dataloader())
    stops = module(tmp_path, train="*.tar", batch_size=20)
    stops.setup("fit")
    with pytest.raises(
        CorruptSampleError, match=r"03 of .* \(UnidentifiedImageError: cannot identify image file\)|05 of"
    ):
        list(stops.train_dataloader())


def test_readers_that_share_shards_are_announced(drawn):
    data = module(drawn, num_workers=5)
    with pytest.warns(UserWarning, match=r"3 shards for 5 readers \(1 ranks with 5 workers each\)"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("a.csv", "path\ttitle\nx.jpg\ty", {"format": "csv"}, "has no column 'filepath' \\(image_key\\)"),
        ("a.csv", "filepath\ttitle\nx.jpg", {"format": "csv"}, "line 2 has 1 cells, expected 2"),
        ("a.csv", "filepath\ttitle\nx.jpg\t  ", {"format": "csv"}, "line 2: the caption is empty"),
        ("a.csv", "filepath\ttitle\n", {"format": "csv"}, "has no pair of a picture and a caption"),
        ("a.jsonl", '{"filepath": "x.jpg"}', {"format": "jsonl"}, "line 1 has no 'title'"),
        ("a.jsonl", "{", {"format": "jsonl"}, "line 1 is no JSON"),
        ("a.json", '{"images": [{"split": "val"}]}', {"format": "karpathy"}, "no picture of the split train"),
        ("a.json", '{"images": []}', {"format": "coco"}, "has no 'annotations'"),
        ("a.txt", "", {"train": "{0..2}.tar"}, "3 of 3 tars are missing"),
        ("a.txt", "", {"train": "{0-2}.tar"}, "expected {first..last}"),
    ],
)
def test_faults_are_one_sentence(tmp_path, file, content, options, message):
    (tmp_path / file).write_text(content)
    data = module(tmp_path, **{"train": file, "batch_size": 1, **options})
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_empty_captions_are_left_out_where_that_is_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("filepath\ttitle\nx.jpg\t \ny.jpg\ta word")
    data = module(tmp_path, format="csv", train="a.csv", on_error="skip", batch_size=1)
    data.setup("fit")
    assert len(data.datasets["train"]) == 1


def test_options_that_exclude_each_other(tmp_path):
    for options, message in (
        ({"query": "a", "labels": ["b"]}, "labels and query exclude"),
        ({"query": "a", "queries": Path("b")}, "query and queries exclude"),
        ({"zero_shot": [ZeroShotSet("a", Path())] * 2}, "different names"),
        ({"max_skip_fraction": 2}, r"max_skip_fraction=2: it must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            module(tmp_path, **options)


def test_evaluation_reads_classes_and_both_sides(drawn):
    data = module(drawn, **SETS)
    with pytest.warns(UserWarning, match="is synthetic: scenes drawn by sample: true"):
        data.setup("test")
    parts = ["test_things", "test_drawn_gallery", "test_drawn_queries"]
    assert data.parts("test") == parts
    loaders = data.test_dataloader()
    assert list(loaders) == parts
    prompts = data.prompts["test_things"]
    assert prompts.input_ids.shape == (32, 3, 24)
    assert prompts.class_names[0] == "black circle"
    labels = torch.cat([batch["label"] for batch in loaders["test_things"]])
    assert labels.bincount().tolist() == [3] * 32
    queries = list(loaders["test_drawn_queries"])
    gallery = sum(len(batch["path"]) for batch in loaders["test_drawn_gallery"])
    assert torch.cat([batch["identity"] for batch in queries]).tolist() == [
        i // 2 for i in range(2 * gallery)
    ]
    assert data.synthetic


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ZeroShotSet("x", Path("zeroshot"), templates=["a thing"]), "the template 'a thing' has no {}"),
        (ZeroShotSet("x", Path("zeroshot"), Path("zeroshot.json"), ["a thing"]), "'a thing' has no {}"),
        (ZeroShotSet("x", Path("zeroshot"), templates=[]), "there is no template"),
        (ZeroShotSet("x", Path("zeroshot"), Path("few.json")), "has 2 names, and there are 32 folders"),
        (ZeroShotSet("x", Path("zeroshot"), Path("other.json")), "no name for the folder black_circle"),
        (ZeroShotSet("x", Path("train")), "there is no folder of a class"),
        (ZeroShotSet("x", Path("train"), dataset="Nothing"), "torchvision has no data set 'Nothing'"),
        (ZeroShotSet("x", Path("train"), dataset="CIFAR10"), "torchvision's CIFAR10 says"),
    ],
)
def test_faults_of_zero_shot_sets(drawn, tmp_path, chosen, message):
    root = tmp_path / "copy"
    shutil.copytree(drawn, root)
    (root / "few.json").write_text('{"classes": ["a", "b"]}')
    (root / "other.json").write_text('{"classes": {"a": "b"}}')
    with pytest.raises(DataError, match=message):
        module(root, zero_shot=[chosen]).setup("test")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (RetrievalSet("x", Path("none.json")), "there is no file"),
        (RetrievalSet("x", Path("scenes_karpathy.json")), "pictures are not in"),
        (RetrievalSet("x", Path("scenes_karpathy.json"), split="dev"), "no picture of the split dev"),
        (RetrievalSet("x", Path("scenes_karpathy.json"), prompt="a photo"), "the prompt 'a photo' has no {}"),
    ],
)
def test_faults_of_retrieval_sets(drawn, chosen, message):
    with pytest.raises((DataError, FileNotFoundError), match=message):
        module(drawn, retrieval=[chosen]).setup("test")


def test_open_clips_templates():
    from datamodules.image_text.evaluation import template_texts

    assert len(template_texts("openai", "t")) == 80
    assert template_texts("simple", "t")[0] == "itap of a {}."


def test_prediction_of_a_folder(drawn, tmp_path):
    with pytest.raises(MisconfigurationException, match="nothing says what to predict on"):
        module(drawn).setup("predict")
    with pytest.raises(MisconfigurationException, match="give query or queries"):
        module(drawn, gallery=drawn / "test").setup("predict")
    labelled = module(drawn, gallery=drawn / "test", labels=["red circle", "blue square"])
    labelled.setup("predict")
    assert labelled.parts("predict") == ("predict",)
    assert labelled.prompts["predict"].input_ids.shape == (2, 7, 24)
    assert labelled.class_names == ["red circle", "blue square"]
    asked = module(drawn, gallery=drawn / "test", query="a red circle")
    asked.setup("predict")
    assert list(asked.predict_dataloader()) == ["predict_gallery", "predict_queries"]
    (tmp_path / "q.txt").write_text("a\n\nb")
    with pytest.raises(DataError, match="line 2: it is empty"):
        module(drawn, gallery=drawn / "test", queries=tmp_path / "q.txt").setup("predict")


def test_pieces():
    assert expand_braces("a{08..10}.{x,y}") == ["a08.x", "a09.x", "a10.x", "a08.y", "a09.y", "a10.y"]
    assert list(Strings(["é", "", "b"])) == ["é", "", "b"]


def test_captions_say_what_lies_where():
    from datamodules.samples.scenes import Thing

    def said(first, second):
        return captions_of([Thing("red", "circle", first), Thing("blue", "cross", second)])[1]

    assert said(0, 2) == "a red circle left of a blue cross"
    assert said(0, 6) == "a blue cross below a red circle"
    assert said(2, 3) == "a blue cross below and left of a red circle"
