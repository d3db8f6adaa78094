"""The tasks of GLUE: where each column stands in the official TSVs and in the hub's tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        folder: of the official TSVs.
        sentences: names of the columns with the sentences, in the TSVs' headers.
        label: name of the label's column.
        classes: names of the classes in the order of their numbers; None where a number is predicted.
        metrics: that GLUE reports.
        submission: names of the files that GLUE's site takes, by part of the test set.
        hub: the hub's configuration.
        hub_sentences: names of the columns there, and in saved tables.
        columns: of TSVs without a header, by split: place of each name.
        files: of each split, by part; where they are not `train.tsv`, `dev.tsv`, `test.tsv`.
        words: whether labels are written as words in the TSVs and in the submission, not as numbers.
    """

    folder: str
    sentences: tuple[str, ...]
    label: str
    classes: tuple[str, ...] | None
    metrics: tuple[Metric, ...]
    submission: Mapping[str, str]
    hub: str
    hub_sentences: tuple[str, ...]
    columns: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    words: bool = False

    def parts(self, split: str) -> dict[str, str]:
        """File of each part of a split; a split of one part calls it by its own name.

        Args:
            split: `train`, `val` or `test`.
        """
        name = {"train": "train", "val": "dev", "test": "test"}[split]
        return dict(self.files.get(split, {split: f"{name}.tsv"}))

    def hub_split(self, split: str, part: str) -> str:
        """The hub's name of a part of a split."""
        name = {"train": "train", "val": "validation", "test": "test"}[split]
        return name if part == split else f"{name}_{part}"


_NLI = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_COLA = {"label": 1, "sentence": 3}

TASKS: dict[str, Task] = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        ("matthews",),
        {"test": "CoLA.tsv"},
        "cola",
        ("sentence",),
        columns={"train": _COLA, "val": _COLA},
    ),
    "sst2": Task(
        "SST-2",
        ("sentence",),
        "label",
        ("negative", "positive"),
        ("accuracy",),
        {"test": "SST-2.tsv"},
        "sst2",
        ("sentence",),
    ),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
        {"test": "MRPC.tsv"},
        "mrpc",
        ("sentence1", "sentence2"),
    ),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        {"test": "QQP.tsv"},
        "qqp",
        ("question1", "question2"),
    ),
    "stsb": Task(
        "STS-B",
        ("sentence1", "sentence2"),
        "score",
        None,
        ("pearson", "spearman"),
        {"test": "STS-B.tsv"},
        "stsb",
        ("sentence1", "sentence2"),
    ),
    "mnli": Task(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        _MNLI,
        ("accuracy",),
        {"matched": "MNLI-m.tsv", "mismatched": "MNLI-mm.tsv"},
        "mnli",
        ("premise", "hypothesis"),
        files={
            "val": {"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"},
            "test": {"matched": "test_matched.tsv", "mismatched": "test_mismatched.tsv"},
        },
        words=True,
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        "label",
        _NLI,
        ("accuracy",),
        {"test": "QNLI.tsv"},
        "qnli",
        ("question", "sentence"),
        words=True,
    ),
    "rte": Task(
        "RTE",
        ("sentence1", "sentence2"),
        "label",
        _NLI,
        ("accuracy",),
        {"test": "RTE.tsv"},
        "rte",
        ("sentence1", "sentence2"),
        words=True,
    ),
    "wnli": Task(
        "WNLI",
        ("sentence1", "sentence2"),
        "label",
        ("not_entailment", "entailment"),
        ("accuracy",),
        {"test": "WNLI.tsv"},
        "wnli",
        ("sentence1", "sentence2"),
    ),
    "ax": Task(
        "AX",
        ("sentence1", "sentence2"),
        "label",
        _MNLI,
        ("matthews",),
        {"test": "AX.tsv"},
        "ax",
        ("premise", "hypothesis"),
        files={"test": {"test": "diagnostic.tsv"}},
        words=True,
    ),
}
"""GLUE's tasks by name; `ax` are the diagnostics, which have a test set only."""
