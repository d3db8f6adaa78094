"""GLUE's tasks and CoNLL's entities as batches of token ids, by the tokenizer of their model."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split
from datamodules.glue.conll import TaggedSentence, read_conll, tag_names
from datamodules.glue.reading import Example, is_table, read_generated, read_table, read_tsv
from datamodules.glue.tasks import TASKS, Task
from datamodules.reading import DataError
from datamodules.samples.sentiment import write_sentiment
from datamodules.text.corpora import HUB


class ExampleDataset(Dataset[dict[str, Any]]):
    """Examples by index; a sample is a dictionary with `example` and `index`."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"example": self.examples[index], "index": index}


class TokenizedDataModule(DataModule):
    """What text tasks share: the model's tokenizer, and batches that it pads.

    Args:
        max_length: tokens of an input, special ones included; longer ones are cut.
        options: of `DataModule`.
    """

    def __init__(self, *, max_length: int = 128, **options: Any) -> None:
        super().__init__(**options)
        if max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {max_length}.")
        self.max_length = max_length
        self.tokenizer: Any = None
        """Set it where there is no Trainer; otherwise it is the model's."""

    def model_tokenizer(self) -> Any:
        """The tokenizer of the model, or the one that was set.

        Raises:
            MisconfigurationException: there is none.
        """
        tokenizer = self.tokenizer
        if tokenizer is None and self.trainer is not None:
            tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise MisconfigurationException(
                f"{type(self).__name__} uses the model's tokenizer, and there is none: use a TextClassifier, "
                "or set `datamodule.tokenizer`."
            )
        return tokenizer

    def model_prompt(self) -> str | None:
        """What the model wants in front of a sentence, or a template with `{0}` and `{1}` for sentences."""
        return None if self.trainer is None else getattr(self.trainer.lightning_module, "prompt", None)


class GlueDataModule(TokenizedDataModule):
    """A task of GLUE, from the official TSVs, from what `datasets` saved, from parquet files, or the hub.

    Batches are dicts: "input_ids" int64 (B, L), "attention_mask" int64 (B, L), "token_type_ids" where the
    tokenizer makes them, "index" int64 (B,), "label" int64 (B,) or float32 (B,) of scores (not in the test
    sets, whose labels GLUE keeps), "probabilities" float32 (B, C) of generated texts.

    TSVs are read without quoting: a quotation mark is text. `test` measures on the development set, as the
    test set has no labels; `predict` reads the test set. MNLI has two parts, `matched` and `mismatched`.

    Args:
        task: `cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte`, `wnli` or `ax`.
        hub: `hub:owner/name` to read from the hub; None reads `root`.
        generated: a `generated.tsv` to train on in place of the task's training set, which is not opened
            then.
        sample_size: sentences of the training set that `sample: true` writes, for `sst2`; a quarter as many
            to evaluate on.
        options: of `TokenizedDataModule` and `DataModule`; `on_error: skip` leaves malformed rows out.

    Raises:
        ValueError: there is no such task.
    """

    layout: ClassVar[str] = (
        "the task's folder with train.tsv, dev.tsv and test.tsv (SST-2/dev.tsv, ...), or a folder that "
        "`datasets` saved, or the hub's parquet files (sst2/validation-00000-of-00001.parquet)"
    )

    def __init__(
        self,
        *,
        task: str = "sst2",
        hub: str | None = None,
        generated: Path | None = None,
        sample_size: int = 4000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if task not in TASKS:
            raise ValueError(f"task: GLUE has no '{task}', only {', '.join(TASKS)}.")
        if hub is not None and not hub.startswith(HUB):
            raise ValueError(f"hub: write {HUB}owner/name, such as {HUB}nyu-mll/glue, not '{hub}'.")
        self.task_name = task
        self.task: Task = TASKS[task]
        self.hub = hub
        self.generated = None if generated is None else Path(generated).expanduser()
        self.sample_size = sample_size

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes; None where a score is predicted."""
        return None if self.task.classes is None else list(self.task.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 where a score is predicted."""
        return len(self.task.classes or ("score",))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that GLUE reports of the task."""
        return self.task.metrics

    @property
    def submissions(self) -> Mapping[str, str]:
        """Names of the files that GLUE's site takes, by part of what is predicted."""
        return dict(self.task.submission)

    def parts(self, split: Split) -> Sequence[str]:
        """The parts of an evaluation: for MNLI `matched` and `mismatched`."""
        if split == "train":
            return ("train",)
        return [self._key(split, part) for part in self.task.parts(self._file_split(split))]

    def _file_split(self, split: Split) -> str:
        return {"train": "train", "val": "val", "test": "val", "predict": "test"}[split]

    def _key(self, split: Split, part: str) -> str:
        return split if part == self._file_split(split) else part

    def write_sample(self) -> None:
        """Writes a procedural sentiment task in SST-2's layout, a general corpus and a tokenizer."""
        if self.task_name != "sst2":
            raise MisconfigurationException("sample: true writes sst2 only.")
        write_sentiment(self.root, self.sample_size)

    def setup(self, stage: str) -> None:
        """Reads the splits of `stage`.

        Raises:
            FileNotFoundError: a file is not there.
            DataError: a row is malformed; names file and line.
        """
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for split in splits[stage]:
            self.read(split)

    def read(self, split: Split) -> None:
        """Read a split into `datasets`, unless it is there."""
        kind = self._file_split(split)
        for part in self.task.parts(kind):
            key = self._key(split, part)
            if split == "train" and self.generated is not None:
                self.require(self.generated)
                examples = read_generated(self.generated, self.num_classes)
            else:
                examples = self._examples(kind, part)
            if not examples:
                raise DataError(f"GlueDataModule: the {part} text of {self.task_name} has no sentence.")
            self.datasets[key] = ExampleDataset(examples)

    def _examples(self, kind: str, part: str) -> list[Example]:
        if self.hub is not None:
            return read_table(self.hub, self.task, kind, part)
        if is_table(self.root, self.task):
            return read_table(self.root, self.task, kind, part)
        folder = self.root / self.task.folder
        path = (folder if folder.is_dir() else self.root) / self.task.parts(kind)[part]
        self.require(path)
        return read_tsv(path, self.task, kind, self.on_error)

    def calibration_segments(self) -> Tensor:
        """128 segments to calibrate with, int64 (128, max_length): training sentences one after another.

        Raises:
            DataError: there is too little text.
        """
        self.read("train")
        tokenizer = self.model_tokenizer()
        samples = self.datasets["train"]
        ids: list[int] = []
        for place in range(len(samples)):  # type: ignore[arg-type]
            ids += tokenizer(" ".join(samples[place]["example"].sentences)).input_ids
            if len(ids) >= 128 * self.max_length:
                break
        count = min(128, len(ids) // self.max_length)
        if not count:
            raise DataError(
                f"The training text has {len(ids)} tokens, too few for max_length: {self.max_length}."
            )
        return torch.tensor(ids[: count * self.max_length]).view(count, self.max_length)

    def collation(self) -> Callable[[list[Any]], Any]:
        """Tokenises and pads a batch."""
        return SentenceCollation(
            self.model_tokenizer(), self.max_length, self.model_prompt(), self.task.classes is None
        )


class SentenceCollation:
    """Makes a batch of examples.

    Args:
        tokenizer: of the model.
        max_length: tokens of an input.
        prompt: see `TokenizedDataModule.model_prompt`.
        scores: labels are float32.
    """

    def __init__(self, tokenizer: Any, max_length: int, prompt: str | None, scores: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.prompt = prompt
        self.scores = scores

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, see `GlueDataModule`."""
        examples: list[Example] = [sample["example"] for sample in samples]
        columns = list(zip(*(prompted(example.sentences, self.prompt) for example in examples), strict=True))
        encoded = self.tokenizer(
            *map(list, columns),
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        batch: dict[str, Any] = {
            name: encoded[name]
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in encoded
        }
        batch["index"] = torch.tensor([sample["index"] for sample in samples])
        if all(example.label is not None for example in examples):
            kind = torch.float32 if self.scores else torch.int64
            batch["label"] = torch.tensor([example.label for example in examples], dtype=kind)
        if all(example.probabilities is not None for example in examples):
            batch["probabilities"] = torch.tensor([example.probabilities for example in examples])
        return batch


def prompted(sentences: tuple[str, ...], prompt: str | None) -> tuple[str, ...]:
    """What the tokenizer is given: the sentences, or one text with the prompt."""
    if prompt is None:
        return sentences
    if "{0}" not in prompt:
        return (prompt + sentences[0], *sentences[1:])
    return (re.sub(r"\{([01])\}", lambda found: sentences[int(found[1])], prompt),)


class EntityDataModule(TokenizedDataModule):
    """Named entities in CoNLL-2003's format, a word a line, tagged in IOB1 or IOB2.

    Batches are dicts: "input_ids" and "attention_mask" int64 (B, L), "index" int64 (B,), "label" int64
    (B, L): the tag's number at the first sub-token of each word, -100 elsewhere.

    Args:
        train: file to train on, relative to `root`.
        val: file to validate on.
        test: file to test on, and to predict.
        entity_types: of the entities.
        options: of `TokenizedDataModule` and `DataModule`.
    """

    layout: ClassVar[str] = (
        "eng.train, eng.testa and eng.testb of CoNLL-2003, or files that train, val, test name"
    )
    metrics = ("entity_f1", "accuracy")

    def __init__(
        self,
        *,
        train: str = "eng.train",
        val: str = "eng.testa",
        test: str = "eng.testb",
        entity_types: Sequence[str] = ("PER", "ORG", "LOC", "MISC"),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.files: dict[Split, str] = {"train": train, "val": val, "test": test, "predict": test}
        self.entity_types = list(entity_types)

    @property
    def class_names(self) -> list[str]:
        """The tags in the order of their numbers."""
        return tag_names(self.entity_types)

    @property
    def num_classes(self) -> int:
        """Number of tags."""
        return len(self.class_names)

    def setup(self, stage: str) -> None:
        """Reads the splits of `stage`.

        Raises:
            FileNotFoundError: a file is not there.
            DataError: a line is malformed; names file and line.
        """
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for split in splits[stage]:
            self.read(split)

    def read(self, split: Split) -> None:
        """Read a split into `datasets`."""
        path = self.root / self.files[split]
        self.require(path)
        self.datasets[split] = ExampleDataset(read_conll(path, self.entity_types))

    def collation(self) -> Callable[[list[Any]], Any]:
        """Tokenises and pads a batch."""
        return EntityCollation(self.model_tokenizer(), self.max_length, self.class_names)


class EntityCollation:
    """Makes a batch of tagged sentences.

    Args:
        tokenizer: of the model; one that knows which token is of which word.
        max_length: tokens of an input.
        tags: in the order of their numbers.
    """

    def __init__(self, tokenizer: Any, max_length: int, tags: Sequence[str]) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise MisconfigurationException(
                "EntityDataModule needs a fast tokenizer (tokenizer.json), which knows the word of a token."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.numbers = {tag: number for number, tag in enumerate(tags)}

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, see `EntityDataModule`."""
        sentences: list[TaggedSentence] = [sample["example"] for sample in samples]
        encoded = self.tokenizer(
            [list(sentence.words) for sentence in sentences],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(encoded["input_ids"], -100)
        for row, sentence in enumerate(sentences):
            before: int | None = None
            for place, word in enumerate(encoded.word_ids(row)):
                if word is not None and word != before:
                    labels[row, place] = self.numbers[sentence.tags[word]]
                before = word
        index = torch.tensor([sample["index"] for sample in samples])
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "label": labels,
            "index": index,
        }
