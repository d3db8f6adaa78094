"""A general corpus to train on and a task to measure on: for a distillation without the task's data."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split
from datamodules.glue.module import EntityDataModule, GlueDataModule, TokenizedDataModule
from datamodules.reading import DataError
from datamodules.text.corpora import read_documents

log = logging.getLogger(__name__)

_HEADING = re.compile(r"^ ?=.*= ?$")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_CHUNK = 4096  # sentences that are tokenised at once


class TokenDataset(Dataset[dict[str, Any]]):
    """Sentences as token ids, in one array; a sample is a dictionary with `tokens` and `index`.

    Args:
        tokens: of all sentences, one after another.
        ends: where each sentence ends.
    """

    def __init__(self, tokens: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(self.ends[index - 1]) if index else 0
        return {"tokens": self.tokens[start : int(self.ends[index])], "index": index}


class CorpusToTask(DataModule):
    """Trains on sentences of a general corpus, validates and tests on a task; predicts on the corpus.

    The task's training file is never opened, unless `train_on: task` asks for it (the upper bound of the
    comparison). Training batches are dicts: "input_ids" int64 (B, L), the sentence's tokens, with the
    tokenizer's end and without a prompt; "mask" bool (B, L), False on the padding; "index" int64 (B,). Those
    of `val` and `test` are the task's.

    Passages of the corpus are split into sentences; those below `min_tokens` are left out, longer ones than
    `length` are cut into several. Blank lines and headings (` = Title = `) are dropped.

    Args:
        task: the task's data: a `GlueDataModule` or an `EntityDataModule`; root and options are its own.
        corpus: source of text, see `TextDataModule`; relative to `root`.
        train_on: what is read in training.
        length: L_x, most tokens of a sentence, its end included.
        min_tokens: fewest tokens of a sentence.
        max_sentences: read so many of the corpus; None: all, which is held in memory, four bytes a token.
        column: of JSON objects and tables.
        options: of `DataModule`; `root` of the corpus.

    Raises:
        ValueError: a length is out of its range.
    """

    layout: ClassVar[str] = "the text that `corpus` names, a passage a line"

    def __init__(
        self,
        *,
        task: DataModule,
        corpus: str = "corpus.txt",
        train_on: Literal["corpus", "task"] = "corpus",
        length: int = 64,
        min_tokens: int = 4,
        max_sentences: int | None = 1_000_000,
        column: str = "text",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(task, (GlueDataModule, EntityDataModule)):
            raise MisconfigurationException(
                f"CorpusToTask.task: {type(task).__name__} is no GlueDataModule or EntityDataModule."
            )
        if not 1 <= min_tokens <= length:
            raise ValueError(f"min_tokens ({min_tokens}) must be in 1 to length ({length}).")
        if max_sentences is not None and max_sentences < 1:
            raise ValueError(f"max_sentences must be at least 1, got {max_sentences}.")
        self.task: TokenizedDataModule = task
        self.corpus = corpus
        self.train_on = train_on
        self.length = length
        self.min_tokens = min_tokens
        self.max_sentences = max_sentences
        self.column = column

    # What the task says

    @property
    def class_names(self) -> Sequence[str] | None:
        """The task's."""
        return self.task.class_names  # type: ignore[attr-defined]

    @property
    def num_classes(self) -> int:
        """The task's."""
        return self.task.num_classes  # type: ignore[attr-defined]

    @property
    def metrics(self) -> Sequence[str]:
        """The task's."""
        return self.task.metrics  # type: ignore[attr-defined]

    @property
    def reads_task(self) -> bool:
        """Whether training reads the task's own training text."""
        return self.train_on == "task"

    def parts(self, split: Split) -> Sequence[str]:
        """The task's, in its evaluations."""
        return self.task.parts(split) if split in ("val", "test") else (split,)

    # Reading

    def prepare_data(self) -> None:
        """The task's sample, where that is asked for."""
        self.task.prepare_data()

    def setup(self, stage: str) -> None:
        """Reads the corpus in `fit` and `predict`, and the task's development set in all but `predict`.

        Raises:
            DataError: no sentence of the corpus has a legal length.
            FileNotFoundError: a file is not there.
        """
        self.task.trainer = self.trainer
        evaluated: dict[str, Split] = {"fit": "val", "validate": "val", "test": "test"}
        if stage in evaluated:
            self.task.read(evaluated[stage])  # type: ignore[attr-defined]
            self.datasets |= self.task.datasets
        if stage in ("fit", "predict"):
            split = "train" if stage == "fit" else "predict"
            texts = self._task_sentences() if self.reads_task else self._sentences()
            self.datasets[split] = self._tokenised(texts)

    def _task_sentences(self) -> Iterator[str]:
        self.task.read("train")  # type: ignore[attr-defined]
        samples: Any = self.task.datasets["train"]
        for place in range(len(samples)):
            example = samples[place]["example"]
            yield " ".join(getattr(example, "sentences", ()) or example.words)

    def _sentences(self) -> Iterator[str]:
        for passage in read_documents(self.root, self.corpus, self.column, "line"):
            text = passage.strip()
            if text and not _HEADING.match(passage.rstrip("\n")):
                yield from (part for part in _END_OF_SENTENCE.split(text) if part)

    def _tokenised(self, texts: Iterator[str]) -> TokenDataset:
        tokenizer = self.task.model_tokenizer()
        self._end = end = _end_of(tokenizer)
        room = self.length - (end is not None)
        chosen: list[NDArray[np.int32]] = []
        dropped = 0
        while chunk := list(islice(texts, _CHUNK)):
            for ids in tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids:
                for start in range(0, max(len(ids), 1), room):
                    piece = ids[start : start + room] + ([] if end is None else [end])
                    if len(piece) < self.min_tokens:
                        dropped += 1
                    else:
                        chosen.append(np.array(piece, dtype=np.int32))
            if self.max_sentences is not None and len(chosen) >= self.max_sentences:
                log.info("CorpusToTask: the first %d sentences are read (max_sentences).", self.max_sentences)
                chosen = chosen[: self.max_sentences]
                break
        if not chosen:
            raise DataError(
                f"CorpusToTask: the text '{self.corpus}' in {self.root} has no sentence of "
                f"{self.min_tokens} to {self.length} tokens ({dropped} shorter ones)."
            )
        return TokenDataset(np.concatenate(chosen), np.cumsum([len(piece) for piece in chosen]))

    def collation(self) -> Callable[[list[Any]], Any]:
        """Pads a batch of sentences, or does what the task does with its examples."""
        pad = self.task.model_tokenizer().pad_token_id
        return _Collation(0 if pad is None else pad, self.task.collation())


class _Collation:
    def __init__(self, pad: int, task: Callable[[list[Any]], Any]) -> None:
        self.pad = pad
        self.task = task

    def __call__(self, samples: list[Mapping[str, Any]]) -> Any:
        if "tokens" not in samples[0]:
            return self.task(samples)
        longest = max(len(sample["tokens"]) for sample in samples)
        ids = torch.full((len(samples), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(samples), longest, dtype=torch.bool)
        for row, sample in enumerate(samples):
            count = len(sample["tokens"])
            ids[row, :count] = torch.from_numpy(sample["tokens"].astype(np.int64))
            mask[row, :count] = True
        index = torch.tensor([sample["index"] for sample in samples])
        return {"input_ids": ids, "mask": mask, "index": index}


def _end_of(tokenizer: Any) -> int | None:
    """The id that a tokenizer puts behind a sentence; None where there is none."""
    text, whole = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    return whole[-1] if whole and whole[-1:] != text[-1:] else None
