"""TextDataModule: what is published is read, and segments are cut as they should be."""

import gzip
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules import CorruptSampleError, TextDataModule
from datamodules.samples.text import prose
from datamodules.text.corpora import packed_segments, random_segments, read_documents
from tests.fuzzing import fuzz, outcome


class Letters:
    """One token a character."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})()


def make(root, **options):
    defaults = {"root": root, "seq_len": 16, "batch_size": 2, "n_calibration": 3, "num_workers": 0}
    data = TextDataModule(**{**defaults, **options})
    data.tokenizer = Letters()
    return data


def text_of(ids):
    return "".join(map(chr, ids.flatten().tolist()))


@pytest.fixture
def root(tmp_path):
    for name, letter in (("train", "a"), ("valid", "b"), ("test", "c")):
        (tmp_path / f"{name}.txt").write_text(letter * 70)
    return tmp_path


def test_every_split_is_packed_and_the_tail_dropped(root):
    data = make(root)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    shapes = {split: tuple(dataset.segments.shape) for split, dataset in data.datasets.items()}
    assert shapes == {"train": (4, 16), "val": (4, 16), "test": (4, 16), "predict": (4, 16)}
    batches = list(data.test_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert text_of(batches[0]["input_ids"]) == "c" * 32
    assert tuple(data.calibration_segments().shape) == (3, 16)
    limited = make(root, eval_segments=1)
    limited.setup("test")
    assert len(limited.datasets["test"]) == 1


def test_every_segment_is_on_one_rank(root):
    data = make(root, seq_len=10)
    data.setup("test")
    seen = []
    for rank in range(4):
        data._ranks = lambda rank=rank: (rank, 4)
        seen += [index for batch in data.test_dataloader() for index in batch["index"].tolist()]
    assert sorted(seen) == list(range(7))


def test_a_folder_is_joined_in_the_order_of_its_names(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("b", "a", "c"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "notes.md").write_text("no")
    assert list(read_documents(tmp_path, "books")) == ["a", "b", "c"]
    assert list(read_documents(tmp_path, "books/[ac].txt")) == ["a", "c"]


def test_a_folder_is_read_as_the_images_are(tmp_path, caplog):
    """Folders in it belong to it, what is hidden does not, and links to it end."""
    for name in ("a.txt", "deep/b.txt", "._a.txt", ".cache/c.txt", "__MACOSX/d.txt", "@eaDir/e.txt", "f.md"):
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.stem)
    for link in ("one", "two"):
        (tmp_path / "books" / "deep" / link).symlink_to(tmp_path / "books")
    with caplog.at_level(logging.INFO, "datamodules.text.corpora"):
        assert list(read_documents(tmp_path, "books")) == ["a", "b"]
    assert "books: 2 files (left out: 4 hidden, 1 other)" in caplog.text
    assert list(read_documents(tmp_path, "books/**/*.txt")) == ["a", "b"]
    assert list(read_documents(tmp_path, "books/*/*.txt")) == ["b"]


def test_the_case_of_an_ending_says_nothing(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "B.JSONL").write_text('{"text": "two"}')
    (tmp_path / "c.ndjson").write_text('{"text": "three"}')
    (tmp_path / "D.TXT.GZ").write_bytes(gzip.compress(b"four"))
    assert list(read_documents(tmp_path, ".")) == ["one", "two", "four", "three"]
    assert list(read_documents(tmp_path, "B.JSONL")) == ["two"]


def test_lines_are_rows_as_the_hub_has_them(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Text here . \n")
    rows = list(read_documents(tmp_path, "wiki.test.raw", document="line"))
    assert rows == ["", " = Title = \n", "", " Text here . \n"]


def test_json_lines_and_their_faults(tmp_path):
    with gzip.open(tmp_path / "c4-train.json.gz", "wt") as file:
        file.write(json.dumps({"text": "one", "url": "x"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert list(read_documents(tmp_path, "c4-train.json.gz")) == ["one", "two"]
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: no JSON object with 'text'"):
        list(read_documents(tmp_path, "bad.jsonl"))


def test_token_files(tmp_path):
    torch.save(torch.arange(40), tmp_path / "ids.pt")
    np.save(tmp_path / "ids.npy", np.arange(40).reshape(1, 40))
    for name in ("ids.pt", "ids.npy"):
        assert make(tmp_path, calibration=name, n_calibration=2).calibration_segments()[1, 0] == 16
    np.save(tmp_path / "floats.npy", np.zeros(4))
    with pytest.raises(ValueError, match="integer token ids"):
        make(tmp_path, calibration="floats.npy").calibration_segments()


def test_arrow_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "number": [1, 2]})
    table.save_to_disk(tmp_path / "saved")
    assert list(read_documents(tmp_path, "saved")) == ["one", "two"]
    arrow = next((tmp_path / "saved").glob("*.arrow")).name
    assert list(read_documents(tmp_path, f"saved/{arrow}")) == ["one", "two"]
    with pytest.raises(ValueError, match="no column 'body', only text, number"):
        list(read_documents(tmp_path, "saved", column="body"))
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(MisconfigurationException, match="holds the splits train"):
        list(read_documents(tmp_path, "splits"))
    assert list(read_documents(tmp_path, "splits/train")) == ["one", "two"]


def test_random_segments_come_from_long_documents():
    documents = ["x" * 5, "abcdefghij" * 4, "y" * 8]

    def encode(text):
        return [ord(letter) for letter in text]

    segments = random_segments(documents, encode, 8, 5, seed=0)
    assert tuple(segments.shape) == (5, 8)
    assert all(text_of(row) in documents[1] for row in segments)
    assert torch.equal(segments, random_segments(documents, encode, 8, 5, seed=0))
    assert not torch.equal(segments, random_segments(documents, encode, 8, 5, seed=1))
    with pytest.raises(
        ValueError, match=r"None of 3 documents has more than 40 tokens \(the longest has 40\)"
    ):
        random_segments(documents, encode, 40, 1, seed=0)


def test_too_little_text_says_how_much_there_is(root):
    with pytest.raises(ValueError, match="has 70 tokens, and 9 segments of 16 need 144"):
        make(root, n_calibration=9).calibration_segments()
    with pytest.raises(ValueError, match="has 3 tokens"):
        packed_segments(torch.arange(3), 4)


def test_calibrating_on_the_test_text_is_refused(root):
    with pytest.raises(MisconfigurationException, match=r"calibration and test share .*test\.txt"):
        make(root, calibration="t*.txt").calibration_segments()
    assert len(make(root, calibration="test.txt", allow_overlap=True).calibration_segments()) == 3


def test_mistakes(root):
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        make(root, seq_len=1)
    with pytest.raises(ValueError, match="must be positive"):
        make(root, n_calibration=0)
    with pytest.raises(FileNotFoundError, match=r"no text at .*gone"):
        make(root, test="gone").setup("test")
    data = make(root)
    data.tokenizer = None
    with pytest.raises(MisconfigurationException, match="the model's tokenizer"):
        data.setup("test")


def test_the_sample_is_the_same_text_each_time(tmp_path):
    data = make(tmp_path / "a", sample=True, sample_size=3000)
    data.prepare_data()
    data.prepare_data()
    data.setup("fit")
    text = (tmp_path / "a" / "train.txt").read_text()
    assert text == prose(3000, 0)
    assert len(text) >= 3000
    assert (tmp_path / "a" / "test.txt").read_text() not in text
    with pytest.raises(MisconfigurationException, match="made with"):
        make(tmp_path / "a", sample=True, sample_size=50).prepare_data()


def test_null_rows_are_counted_and_left_out(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n{"text": 2}\n{"text": null}\n')
    datasets.Dataset.from_dict({"text": ["one", None]}).save_to_disk(tmp_path / "saved")
    assert list(read_documents(tmp_path, "a.jsonl")) == ["one", "2"]
    assert "a.jsonl: 2 rows have no 'text'" in caplog.text
    assert list(read_documents(tmp_path, "saved")) == ["one"]
    assert "saved: 1 rows" in caplog.text


def test_chats_are_refused_or_rendered(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: 'messages' holds messages.*chat: true"):
        list(read_documents(tmp_path, "chat.jsonl", "messages"))
    data = make(tmp_path, test="chat.jsonl", column="messages", chat=True, seq_len=4)
    data.tokenizer.apply_chat_template = lambda given, tokenize: f"<{given[0]['role']}>{given[0]['content']}"
    data.setup("test")
    assert text_of(data.datasets["test"].segments) == "<user>hi"
    data.tokenizer.apply_chat_template = lambda given, tokenize: given[0]["name"]
    data.datasets.clear()
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: the chat template"):
        data.setup("test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "café".encode("latin-1")),
        ("wide.txt", "text".encode("utf-16")),
        ("latin.jsonl", '{"text": "café"}'.encode("latin-1")),
        ("plain.txt.gz", b"not compressed"),
        ("cut.txt.gz", gzip.compress(bytes(range(128)) * 99)[:-20]),
        ("bad.parquet", b"PAR1 garbage"),
        ("bad.npy", b"\x93NUMPY garbage"),
        ("bad.pt", b"garbage"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptSampleError, match=name) as raised:
        make(tmp_path, test=name).setup("test")
    assert "pickle" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_compressed_text_a_byte_order_mark_and_hidden_files(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("one")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    (tmp_path / "._b.txt").write_bytes(b"\x00\xff")
    assert list(read_documents(tmp_path, ".")) == ["one", "two"]


def test_an_empty_corpus_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"The test text 'empty\.txt' has 0 tokens"):
        make(tmp_path, test="empty.txt").setup("test")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    with pytest.raises(ValueError, match="no document"):
        make(tmp_path, calibration="null.jsonl", segmentation="random").calibration_segments()


def test_ids_beyond_the_vocabulary_are_named(root):
    data = make(root)
    module = SimpleNamespace(tokenizer=Letters(), tokenizer_name="letters", vocabulary_size=99)
    data.trainer = SimpleNamespace(lightning_module=module)
    data.setup("validate")  # ord("b") is 98
    module.vocabulary_size = 98
    data.datasets.clear()
    with pytest.raises(
        MisconfigurationException, match=r"valid\.txt' has the token id 98.*has 98 .*'letters'"
    ):
        data.setup("validate")


ROWS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@fuzz(80)
@given(
    st.lists(ROWS, max_size=4),
    st.binary(max_size=12),
    st.sampled_from([".jsonl", ".jsonl.gz", ".txt", ".txt.gz"]),
)
def test_any_text_is_read_counted_or_refused_in_a_sentence(tmp_path, rows, noise, suffix):
    content = "\n".join(map(json.dumps, rows)).encode() + b"\n" + noise
    path = tmp_path / f"fuzzed{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") and len(noise) % 2 else content)
    found = outcome(lambda: list(read_documents(tmp_path, path.name)), path)
    if found.read:
        assert all(isinstance(text, str) for text in found.value)
        assert len(found.value) <= max(1, content.count(b"\n") + 1)
