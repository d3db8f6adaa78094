"""An index of a folder of crops: made once, read afterwards, refused where other weights made it."""

import csv
import json
import logging
import shutil

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import RetrievalWriter
from datamodules.person_retrieval import PersonTransforms
from datamodules.reading import CorruptSampleError, DataError
from lightning_modules.cfam import CFAM, LossSettings
from lightning_modules.parts.retrieval import best_matches

SENTENCES = ["a person with red shoes", "someone who carries a blue handbag"]


@pytest.fixture
def crops(people, tmp_path):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(1, 10):
        shutil.copy(people / f"images/{number}.jpg", folder)
    return folder


@pytest.fixture
def search(pedestrians, make_cfam, trainer, tmp_path, crops):
    """Predict on the crops; the rows of the table."""

    def run(module=None, strategy=None, **options):
        options = {"query": SENTENCES[0], "gallery": crops, "index": tmp_path / "index", **options}
        data = pedestrians(root=tmp_path / "nowhere", **options)
        more = {"strategy": strategy, "devices": 2} if strategy else {}
        trainer(callbacks=[RetrievalWriter(top=4)], **more).predict(module or make_cfam(), data)
        return list(csv.DictReader((tmp_path / "retrieval.csv").open()))

    return run


@pytest.fixture
def encoded(monkeypatch):
    """How many images were encoded."""
    counts = []
    encode = CFAM.encode_image
    monkeypatch.setattr(CFAM, "encode_image", lambda self, x: counts.append(len(x)) or encode(self, x))
    return counts


def test_an_index_is_made_once_and_answers_what_a_search_without_it_does(search, encoded, tmp_path):
    plain = search(index=None)
    encoded.clear()
    first = search()
    assert sum(encoded) == 9
    again = search()
    assert sum(encoded) == 9, "the second sentence needs no image"
    assert len(plain) == 4
    for one, other in zip(plain, first, strict=True):
        assert one["path"] == other["path"]
        assert float(one["score"]) == pytest.approx(float(other["score"]), abs=2e-6)
    assert again == first
    page = (tmp_path / "retrieval.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4
    assert SENTENCES[0] in page


def test_a_file_of_sentences_and_two_ranks(search, tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n".join(SENTENCES) + "\n")
    one = search(query=None, queries=sentences)
    assert [row["query"] for row in one] == [SENTENCES[0]] * 4 + [SENTENCES[1]] * 4
    shutil.rmtree(tmp_path / "index")
    assert search(strategy="ddp_fork", query=None, queries=sentences) == one


def test_the_fused_score_is_the_weighted_sum_of_both(make_cfam, search):
    fused = make_cfam(score="fused", alpha=0.6)
    rows = search(fused)
    image = torch.rand(3, 3, 48, 16)
    ids = torch.tensor([[49406, 320, 2533, 49407] + [0] * 36])
    sides = fused._sides(fused.normalize(image), ids.expand(3, -1))
    score = (fused.encode_image(fused.normalize(image)) * fused.encode_text(ids)).sum(dim=1)
    expected = 0.6 * torch.cosine_similarity(sides["v"], sides["t"])
    expected += 0.4 * torch.cosine_similarity(sides["fv"], sides["ft"], dim=-1).mean(dim=1)
    torch.testing.assert_close(score, expected)
    assert len(rows) == 4


def test_other_weights_another_size_and_a_damaged_note_are_refused(search, make_cfam, tmp_path):
    search()
    module = make_cfam()
    with torch.no_grad():
        module.base_model.visual.proj[0, 0] += 1
    with pytest.raises(MisconfigurationException, match=r"index: .*index was made by other weights"):
        search(module)
    with pytest.raises(MisconfigurationException, match=r"with another transform \(resized to 48 x 16"):
        search(transforms=PersonTransforms((32, 16)))
    (tmp_path / "index" / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is no JSON"):
        search()
    text = make_cfam()
    with torch.no_grad():
        text.base_model.ln_final.weight += 1
    shutil.rmtree(tmp_path / "index")
    search()
    search(text)  # what an image goes through is the same


def test_new_crops_are_found_and_damaged_shards_made_again(search, encoded, crops, tmp_path, caplog):
    search()
    shard = next((tmp_path / "index").rglob("shard_*.npy"))
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    encoded.clear()
    with caplog.at_level(logging.WARNING):
        search()
    assert sum(encoded) == 9
    assert "is damaged" in caplog.text
    shutil.copy(crops / "1.jpg", crops / "new.jpg")
    search()
    assert sum(encoded) == 19


def test_a_crop_that_cannot_be_read_is_named_or_left_out(search, crops):
    (crops / "5.jpg").write_bytes(b"no picture")
    with pytest.raises(CorruptSampleError, match=r"5\.jpg"):
        search()
    assert "5.jpg" not in {row["path"][-5:] for row in search(on_error="skip", query=SENTENCES[1])}


def test_the_test_gallery_says_what_is_right(pedestrians, make_cfam, trainer, people, tmp_path):
    data = pedestrians(index=tmp_path / "index")
    trainer(callbacks=[RetrievalWriter(top=3)]).predict(make_cfam(LossSettings(cid_weight=0)), data)
    rows = list(csv.DictReader((tmp_path / "retrieval.csv").open()))
    records = json.loads((people / "UFine6926_Annotations.json").read_text())
    owners = {record["file_path"]: record["id"] for record in records}
    described = {caption: record["id"] for record in records for caption in record["captions"]}
    assert len(rows) == 3 * 24
    for row in rows:
        right = owners["images/" + row["path"].split("/")[-1]] == described[row["query"]]
        assert row["relevant"] == str(right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "  "}, "query: it is empty, expected a sentence"),
        ({"query": None, "queries": "empty.txt"}, r"empty\.txt, line 1: it is empty"),
        ({"query": None, "queries": "gap.txt"}, r"gap\.txt, line 2: it is empty"),
        ({"gallery": "void"}, "gallery: there are no images in .*void"),
    ],
)
def test_wrong_questions(options, message, search, tmp_path):
    (tmp_path / "void").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "gap.txt").write_text("one\n\nthree\n")
    for name in ("queries", "gallery"):
        if name in options:
            options = {**options, name: tmp_path / options[name]}
    with pytest.raises((DataError, FileNotFoundError), match=message):
        search(**options)


def test_the_best_of_parts_are_the_best_of_all_and_ties_stand_by_place():
    vectors = torch.tensor([[0.5], [1.0], [0.5], [1.0], [0.25]])
    places = torch.arange(5)
    whole = best_matches(torch.ones(1, 1), [(places, vectors)], 4)
    parts = best_matches(torch.ones(1, 1), [(places[i : i + 2], vectors[i : i + 2]) for i in (0, 2, 4)], 4)
    assert whole[1].tolist() == parts[1].tolist() == [[1, 3, 0, 2]]
    assert torch.equal(whole[0], parts[0])
