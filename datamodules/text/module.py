"""Text corpora as segments of tokens: to train on, to calibrate with, and to measure perplexity."""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split
from datamodules.samples.text import write_text
from datamodules.text.corpora import (
    HUB,
    Document,
    Segmentation,
    corpus_files,
    is_tokens,
    packed_segments,
    random_segments,
    read_documents,
    read_tokens,
)


class SegmentDataset(Dataset[dict[str, Any]]):
    """Segments of token ids.

    Args:
        segments: int64 (segments, length).
    """

    def __init__(self, segments: Tensor) -> None:
        self.segments = segments

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.segments[index], "index": index}


def _begun(segments: Tensor, start: int | None) -> Tensor:
    """Segments (count, length) behind a start token, if there is one."""
    return segments if start is None else F.pad(segments, (1, 0), value=start)


class TextDataModule(DataModule):
    """Text from disk or the hub, tokenised as one stream and cut into segments without padding.

    Batches are dicts: "input_ids" int64 (B, L); "index" int64 (B,), the segment's place in the stream. In
    evaluation each segment is seen by exactly one rank, so sums over tokens are exact on any number of ranks.

    A source is a file, a folder with all that is in it or a glob, relative to `root`: `.txt` and `.raw`, also
    as `.gz` (joined in the order of their names), `.jsonl` and `.json.gz` with one object a line (C4),
    `.parquet`, `.arrow`, a folder that `datasets` saved, `.pt` or `.npy` with token
    ids; or `hub:owner/name[/configuration]/split`.

    Args:
        train: source to train on.
        val: source to validate on.
        test: source of the perplexity that is reported.
        predict: source to predict on; None: as `test`.
        calibration: source that quantizers calibrate with; None: as `train`.
        seq_len: tokens of a segment, 2 at least.
        calibration_seq_len: of a calibration segment; None: as `seq_len`.
        n_calibration: segments to calibrate with.
        segmentation: of the calibration text: `packed` takes the first consecutive segments, `random` a
            random slice of randomly drawn documents, as GPTQ does with C4.
        eval_segments: measure on the first so many segments; None: on all.
        column: of JSON objects and tables.
        document: whether a plain text file is one document, or each line is a row (WikiText).
        joiner: what is put between documents.
        add_bos: begin every segment with the tokenizer's start token, in place of one of its tokens; `auto`:
            where the model cannot do without (Gemma), as lm-eval has it. `results.json` says which.
        chat: `column` holds lists of messages (`role`, `content`), of which the tokenizer's chat template
            makes the text; otherwise they are refused.
        allow_overlap: calibrate on the very files that are evaluated on.
        sample_size: characters of the training text that `sample: true` writes; a tenth as many to evaluate
            on.
        options: of `DataModule`.

    Raises:
        ValueError: a length or a count is out of its range.
        MisconfigurationException: in `setup`, calibration and evaluation share files, or there is no
            tokenizer.
    """

    layout: ClassVar[str] = "the files that train, val, test and calibration name"

    def __init__(
        self,
        *,
        train: str = "train.txt",
        val: str = "valid.txt",
        test: str = "test.txt",
        predict: str | None = None,
        calibration: str | None = None,
        seq_len: int = 2048,
        calibration_seq_len: int | None = None,
        n_calibration: int = 128,
        segmentation: Segmentation = "packed",
        eval_segments: int | None = None,
        column: str = "text",
        document: Document = "file",
        joiner: str = "\n\n",
        add_bos: Literal["auto"] | bool = "auto",
        chat: bool = False,
        allow_overlap: bool = False,
        sample_size: int = 200_000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if seq_len < 2 or (calibration_seq_len is not None and calibration_seq_len < 2):
            raise ValueError(f"seq_len must be at least 2, got {seq_len} and {calibration_seq_len}.")
        if n_calibration < 1 or (eval_segments is not None and eval_segments < 1):
            raise ValueError(
                f"n_calibration and eval_segments must be positive, got {n_calibration}, {eval_segments}."
            )
        self.sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        self.calibration = calibration or train
        self.seq_len = seq_len
        self.calibration_seq_len = calibration_seq_len or seq_len
        self.n_calibration = n_calibration
        self.segmentation = segmentation
        self.eval_segments = eval_segments
        self.column = column
        self.document: Document = document
        self.joiner = joiner
        self.add_bos = add_bos
        self.chat = chat
        self.allow_overlap = allow_overlap
        self.sample_size = sample_size
        self.tokenizer: Any = None
        """Set it where there is no Trainer; otherwise it is the model's."""

    def write_sample(self) -> None:
        """Writes procedural English as `train.txt`, `valid.txt` and `test.txt`."""
        write_text(self.root, self.sample_size)

    def setup(self, stage: str) -> None:
        """Tokenises the splits of `stage`.

        Raises:
            MisconfigurationException: there is no tokenizer.
            FileNotFoundError: a source is not there.
            CorruptSampleError: a file cannot be read.
            ValueError: a text is too short for one segment, or a row holds no text.
        """
        wanted: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for split in wanted[stage]:
            if split not in self.datasets:
                ids = self._stream(self.sources[split])
                count = None if split == "train" else self.eval_segments
                name = f"The {split} text '{self.sources[split]}'"
                self.datasets[split] = SegmentDataset(self._packed(ids, self.seq_len, count, name))

    def calibration_segments(self) -> Tensor:
        """The segments to calibrate with, int64 (n_calibration, calibration_seq_len), the same on all ranks.

        Raises:
            MisconfigurationException: they come from the files that are evaluated on.
            ValueError: there is too little text.
        """
        self._check_overlap()
        length, count = self.calibration_seq_len, self.n_calibration
        if self.segmentation == "packed" or is_tokens(self.calibration):
            name = f"The calibration text '{self.calibration}'"
            return self._packed(self._stream(self.calibration), length, count, name)
        documents, start = list(self._documents(self.calibration)), self._start()
        length -= start is not None
        segments = random_segments(documents, self._encode, length, count, self.run_seed)
        return _begun(self._known(segments, self.calibration), start)

    @property
    def starts_text(self) -> bool:
        """Whether every segment begins with the tokenizer's start token."""
        return self._start() is not None

    def _start(self) -> int | None:
        """The token that every segment begins with.

        Raises:
            MisconfigurationException: one is asked for, and the tokenizer has none.
        """
        if self.add_bos is False:
            return None
        if self.add_bos is True:
            token = self._tokenizer().bos_token_id
            if token is None:
                raise MisconfigurationException(
                    "data.add_bos is true, but the tokenizer has no start token (bos_token)."
                )
            return token
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, "start_token", None)

    def _packed(self, ids: Tensor, length: int, count: int | None, name: str) -> Tensor:
        """Segments of `length` tokens, the start token among them."""
        start = self._start()
        return _begun(packed_segments(ids, length - (start is not None), count, name), start)

    def _check_overlap(self) -> None:
        if self.allow_overlap:
            return
        files = self._files(self.calibration)
        for split in ("val", "test"):
            source = self.sources[split]
            shared = files & self._files(source)
            if shared:
                raise MisconfigurationException(
                    f"calibration and {split} share {', '.join(sorted(shared))}: a perplexity on what was "
                    "calibrated "
                    "with says little. Choose other text, or set allow_overlap: true."
                )

    def _files(self, source: str) -> set[str]:
        if source.startswith(HUB):
            return {source}
        try:
            return {str(file.resolve()) for file in corpus_files(self.root, source)}
        except FileNotFoundError:
            return set()

    def _documents(self, source: str) -> Any:
        render = self._render if self.chat else None
        return read_documents(self.root, source, self.column, self.document, render)

    def _render(self, messages: list[Any]) -> str:
        return self._tokenizer().apply_chat_template(messages, tokenize=False)

    def _stream(self, source: str) -> Tensor:
        """All token ids of a source, (tokens,)."""
        import torch

        if is_tokens(source):
            self.require(self.root / source)
            return self._known(read_tokens(self.root / source), source)
        ids = torch.tensor(self._encode(self.joiner.join(self._documents(source))), dtype=torch.int64)
        return self._known(ids, source)

    def _known(self, ids: Tensor, source: str) -> Tensor:
        """The same token ids, if the model knows them all.

        Raises:
            MisconfigurationException: one is beyond the vocabulary; names it, the size and the source.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        size: Any = getattr(module, "vocabulary_size", None)
        outside = ids[(ids < 0) | (ids >= size)] if size is not None else ids[:0]
        if outside.numel():
            name = getattr(module, "tokenizer_name", "unknown")
            raise MisconfigurationException(
                f"'{source}' has the token id {int(outside.flatten()[0])}, but the model's vocabulary has "
                f"{size} tokens, 0 to {size - 1}: the tokenizer ('{name}') is not the model's."
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer()(text, add_special_tokens=False, verbose=False).input_ids

    def _tokenizer(self) -> Any:
        tokenizer = self.tokenizer
        if tokenizer is None and self.trainer is not None:
            tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise MisconfigurationException(
                "TextDataModule uses the model's tokenizer, and there is none: use a CausalLanguageModel, "
                "or set `datamodule.tokenizer`."
            )
        return tokenizer
