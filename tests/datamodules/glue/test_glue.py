"""GLUE's files as they are published, tables, generated text, entities, corpora."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules import CorpusToTask, EntityDataModule, GlueDataModule
from datamodules.glue.conll import read_conll, tag_names, to_iob2
from datamodules.glue.module import prompted
from datamodules.glue.reading import read_generated, read_tsv
from datamodules.glue.tasks import TASKS
from datamodules.reading import DataError
from datamodules.samples.sentiment import LENGTH, write_sentiment
from lightning_modules.language_model import load_tokenizer

HEADERS = {
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said "no .\tShe said no .', 1),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", '0\t1\t2\tWhat ?\t"Why ?\t0', 0),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        '0\tmain\tf\t2012\t1\tnone\tnone\tA plane .\tA "plane .\t4.750',
        4.75,
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tb1\tb2\tp1\tp2\tsentence1\tsentence2\tlabel1\tgold_label",
        '0\t1\t1n\tfiction\t( a )\t( b )\t(R a)\t(R b)\tA "b\tC\tneutral\tneutral',
        1,
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", '0\tWho ?\tHe "said .\tnot_entailment', 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tA\tB\tentailment", 0),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tA\tB\t1", 1),
    "sst2": ("sentence\tlabel", "it 's \"charming \t1", 1),
}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_official_files(tmp_path, name):
    header, row, label = HEADERS[name]
    (example,) = read_tsv(write(tmp_path / "train.tsv", header, row), TASKS[name], "train")
    assert example.label == label
    cells = dict(zip(header.split("\t"), row.split("\t"), strict=True))
    assert example.sentences == tuple(cells[column].strip() for column in TASKS[name].sentences)


def test_cola_has_no_header_in_train_and_one_in_test(tmp_path):
    train = write(tmp_path / "train.tsv", 'gj04\t1\t\tOur "friends .', "gj04\t0\t*\tThey drank the pub .")
    found = read_tsv(train, TASKS["cola"], "train")
    assert [(e.sentences[0], e.label) for e in found] == [('Our "friends .', 1), ("They drank the pub .", 0)]
    test = write(tmp_path / "test.tsv", "index\tsentence", "0\tBill whistled .")
    (example,) = read_tsv(test, TASKS["cola"], "test")
    assert (example.sentences, example.label) == (("Bill whistled .",), None)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", "good\t1\tmore", r"train.tsv, line 3: 3 columns, expected 2"),
        ("sst2", "good\t2", r"line 3: the label is '2', expected 0 to 1"),
        ("sst2", "good\tpositiv", r"the label is 'positiv'"),
        ("rte", "0\tA\tB\t1", r"the label is '1', expected entailment, not_entailment"),
        ("stsb", HEADERS["stsb"][1].replace("4.750", "7"), r"the score is '7', expected a number in 0 to 5"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path, task, row, message):
    path = write(tmp_path / "train.tsv", HEADERS[task][0], HEADERS[task][1], row)
    with pytest.raises(DataError, match=message):
        read_tsv(path, TASKS[task], "train")
    assert len(read_tsv(path, TASKS[task], "train", "skip")) == 1


def test_a_missing_column_is_named(tmp_path):
    path = write(tmp_path / "train.tsv", "text\tlabel", "a\t1")
    with pytest.raises(DataError, match="there is no column 'sentence', only text, label"):
        read_tsv(path, TASKS["sst2"], "train")


def test_saved_and_parquet_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"sentence": ["null", '"quoted'], "label": [1, 0], "idx": [0, 1]}
    table = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / "hub" / "sst2" / f"{split}-00000-of-00001.parquet")
    for root in ("saved", "hub"):
        data = GlueDataModule(root=tmp_path / root, task="sst2", num_workers=0)
        data.setup("fit")
        examples = data.datasets["train"].examples
        assert [(e.sentences[0], e.label) for e in examples] == [("null", 1), ('"quoted', 0)]
        with pytest.raises(FileNotFoundError, match="no test split"):
            data.setup("predict")


def test_mnli_has_two_parts(tmp_path):
    header, row, _ = HEADERS["mnli"]
    for part, label in (("matched", "neutral"), ("mismatched", "entailment")):
        write(tmp_path / "MNLI" / f"dev_{part}.tsv", header, row.replace("\tneutral", f"\t{label}"))
    data = GlueDataModule(root=tmp_path, task="mnli", num_workers=0)
    data.tokenizer = load_tokenizer("bytes")
    data.setup("validate")
    loaders = data.val_dataloader()
    assert {name: next(iter(loader))["label"].tolist() for name, loader in loaders.items()} == {
        "matched": [1],
        "mismatched": [0],
    }


def test_prompts():
    assert prompted(("a {1}", "b"), "mnli hypothesis: {1} premise: {0}") == (
        "mnli hypothesis: b premise: a {1}",
    )
    assert prompted(("a",), "sst2 sentence: ") == ("sst2 sentence: a",)
    assert prompted(("a", "b"), None) == ("a", "b")


def test_generated_text(tmp_path):
    path = write(tmp_path / "generated.tsv", "sentence\tlabel\tp_0\tp_1", 'a "b\t1\t0.25\t0.75')
    (example,) = read_generated(path, 2)
    assert (example.sentences, example.label, example.probabilities) == (('a "b',), 1, (0.25, 0.75))
    with pytest.raises(DataError, match=r"generated.tsv, line 2: .*3 classes"):
        read_generated(path, 3)
    write(path, "sentence\tlabel\tp_0\tp_1", "a\t1\t0.25\t0.9")
    with pytest.raises(DataError, match="line 2"):
        read_generated(path, 2)


# Entities


def test_both_taggings_become_one():
    assert to_iob2(["I-PER", "I-PER", "O", "I-LOC", "I-PER"]) == ["B-PER", "I-PER", "O", "B-LOC", "B-PER"]
    assert to_iob2(["B-PER", "B-PER", "I-PER"]) == ["B-PER", "B-PER", "I-PER"]


def test_entities(tmp_path):
    lines = ("-DOCSTART- -X- O O", "", "John NNP I-NP I-PER", "slept VBD I-VP O", "", "Paris NNP I-NP B-LOC")
    path = write(tmp_path / "eng.testa", *lines)
    first, second = read_conll(path, ["PER", "LOC"])
    assert (first.words, first.tags) == (("John", "slept"), ("B-PER", "O"))
    assert second.tags == ("B-LOC",)
    with pytest.raises(
        DataError, match=r"testa, line 6: the tag is 'B-LOC', expected O, or B- or I- with PER"
    ):
        read_conll(path, ["PER"])
    write(path, "alone")
    with pytest.raises(DataError, match="line 1: 1 columns"):
        read_conll(path, ["PER"])


def test_only_the_first_piece_of_a_word_has_a_label(tmp_path):
    write_sentiment(tmp_path / "data", 16)
    write(tmp_path / "eng.testa", "good NN O", "sad NN I-PER", "", "bad NN O")
    data = EntityDataModule(root=tmp_path, num_workers=0)
    data.tokenizer = load_tokenizer(str(tmp_path / "data" / "tokenizer"))
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    person = tag_names(data.entity_types).index("B-PER")
    assert batch["label"].tolist() == [[-100, 0, person, -100], [-100, 0, -100, -100]]
    data.tokenizer = load_tokenizer("bytes")
    with pytest.raises(MisconfigurationException, match="fast tokenizer"):
        data.collation()


# Corpora


def corpus(tmp_path, text, **options):
    if not (tmp_path / "data").exists():
        write_sentiment(tmp_path / "data", 16)
    write(tmp_path / "data" / "text.txt", *text)
    task = GlueDataModule(root=tmp_path / "data", num_workers=0)
    task.tokenizer = load_tokenizer(str(tmp_path / "data" / "tokenizer"))
    options = {"batch_size": 1, "num_workers": 0, "length": 6, **options}
    return CorpusToTask(task=task, root=tmp_path / "data", corpus="text.txt", **options)


def test_passages_become_sentences_of_legal_length(tmp_path):
    long = "good bad sad kind dull warm weak"
    data = corpus(tmp_path, [" = Title = ", "", "good", long, "good bad sad kind"])
    data.setup("fit")
    tokens = [data.datasets["train"][i]["tokens"].tolist() for i in range(len(data.datasets["train"]))]
    tokenizer = data.task.tokenizer
    words = [tokenizer.decode(ids) for ids in tokens]
    assert words == ["good bad sad kind dull</s>".replace("</s>", " </s>"), "good bad sad kind </s>"]
    batch = next(iter(data.train_dataloader()))
    assert batch["mask"].dtype == torch.bool
    assert batch["input_ids"].shape == batch["mask"].shape


def test_a_corpus_without_a_legal_sentence_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no sentence of 4 to 6 tokens \(1 shorter ones\)"):
        corpus(tmp_path, ["good"]).setup("fit")


def test_the_sample_is_read(tmp_path):
    write_sentiment(tmp_path, 32)
    found = read_tsv(tmp_path / "SST-2" / "train.tsv", TASKS["sst2"], "train")
    assert len(found) == 32
    assert all(len(example.sentences[0].split()) == LENGTH for example in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"task": "snli"}, "GLUE has no 'snli'"), ({"hub": "glue"}, "write hub:owner/name")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GlueDataModule(**options)
