"""Training pairs: a picture and one of its captions, out of tar shards or out of a list."""

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from datamodules.image_text.annotations import Record, Strings, json_line, with_captions
from datamodules.person_retrieval.captions import CaptionTokenizer
from datamodules.reading import CorruptSampleError, DataError, SkipCounter, read_image
from datamodules.streaming import TarShards

Which = Literal["first", "random"]
MEMBERS = {"image": ("jpg", "jpeg", "png", "webp"), "caption": ("txt",)}
"""What of a shard's sample is read; img2dataset's `json` is not."""


class Listed(Protocol):
    """Pictures and captions by number."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> tuple[Path, Sequence[str]]:
        """Path of a picture and its captions, at least one."""
        ...


class Records:
    """Records in little memory.

    Args:
        records: each with a caption.
        root: that their paths are relative to.
    """

    def __init__(self, records: Sequence[Record], root: Path) -> None:
        self.root = root
        self._paths = Strings(record.path for record in records)
        self._captions = Strings(text for record in records for text in record.captions)
        self._first = np.cumsum([0, *(len(record.captions) for record in records)])

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> tuple[Path, Sequence[str]]:
        """Path of a picture and its captions."""
        spoken = range(self._first[index], self._first[index + 1])
        return self.root / self._paths[index], [self._captions[place] for place in spoken]


class JsonLines:
    """Lines of JSON, of which only the places are kept.

    Args:
        file: one object a line.
        image_key: of the picture's path.
        caption_key: of the caption, or of a list of captions.
        root: that paths are relative to.
        skip: leave lines without caption out, instead of refusing them.

    Raises:
        DataError: a line is not as expected.
    """

    def __init__(self, file: Path, image_key: str, caption_key: str, root: Path, skip: bool) -> None:
        self.file, self.root, self._keys = file, root, (image_key, caption_key)
        starts, numbers, at = [], [], 0
        self.empty = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found = json_line(line, *self._keys, f"{file}, line {number}")
                    kept, empty = with_captions([found], skip)
                    self.empty += empty
                    if kept:
                        starts.append(at)
                        numbers.append(number)
                at += len(line)
        self._starts, self._numbers = np.asarray(starts, np.int64), np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, index: int) -> tuple[Path, Sequence[str]]:
        """Path of a picture and its captions."""
        with self.file.open("rb") as lines:
            lines.seek(self._starts[index])
            line = lines.readline()
        found = json_line(line, *self._keys, f"{self.file}, line {self._numbers[index]}")
        return self.root / found.path, found.captions


class TextPairs(Dataset[dict[str, Any]]):
    """Samples with `image`, `input_ids`, `index` and `path`, of what a child reads.

    Args:
        tokenize: captions.
        which: caption of several; a random one is another in each epoch.
        num_workers: that read, whose counts are added up.
    """

    def __init__(self, tokenize: CaptionTokenizer, which: Which = "first", num_workers: int = 0) -> None:
        self.tokenize, self.which = tokenize, which
        length = tokenize.context_length
        self.cut = SkipCounter(num_workers, f"captions are longer than context_length: {length} and were cut")

    def read(self, index: int) -> tuple[Any, Sequence[str], str]:
        """The picture, its captions and its path."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture, captions, path = self.read(index)
        caption = captions[0] if self.which == "first" else random.choice(captions)
        ids, cut = self.tokenize([caption])
        if cut:
            self.cut.add()
        return {"image": picture, "input_ids": ids[0], "index": index, "path": path}


class ListedPairs(TextPairs):
    """Pairs of a list; a picture that is missing is one that cannot be read.

    Args:
        listed: the list.
        options: of `TextPairs`.
    """

    def __init__(self, listed: Listed, **options: Any) -> None:
        super().__init__(**options)
        self.listed = listed

    def __len__(self) -> int:
        return len(self.listed)

    def read(self, index: int) -> tuple[Any, Sequence[str], str]:
        """The picture, its captions and its path."""
        path, captions = self.listed.record(index)
        return read_image(path), captions, str(path)


class ShardPairs(TextPairs):
    """Pairs of tar shards as img2dataset writes them.

    Args:
        files: the shards.
        options: of `TextPairs`.
    """

    def __init__(self, files: Sequence[Path], **options: Any) -> None:
        super().__init__(**options)
        self.shards = TarShards(files, MEMBERS)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def lengths(self) -> list[int]:
        """Samples of each shard."""
        return self.shards.lengths

    def read(self, index: int) -> tuple[Any, Sequence[str], str]:
        """The picture, its caption and its place.

        Raises:
            CorruptSampleError: it cannot be decoded, or the caption is empty.
        """
        sample = self.shards[index]
        where = f"{sample['key']} of {sample['path']}"
        try:
            caption = sample["caption"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise CorruptSampleError(f"the caption of {where} is no UTF-8 ({error.reason})") from error
        if not caption:
            raise CorruptSampleError(f"the caption of {where} is empty, expected a sentence")
        return read_image(io.BytesIO(sample["image"]), where), [caption], f"{sample['path']}/{sample['key']}"


def shard_files(source: str, root: Path) -> list[Path]:
    """Tars of a source: `{00000..00331}.tar`, `*.tar`, a folder, or several of these joined by `::`.

    Raises:
        DataError: a part names none, or one that is not there.
    """
    found: list[Path] = []
    for part in source.split("::"):
        whole = root / part
        if whole.is_dir():
            files = sorted(whole.glob("*.tar"))
        elif "{" in part:
            files = [root / name for name in expand_braces(part)]
        else:
            files = sorted(whole.parent.glob(whole.name)) if set(part) & set("*?[") else [whole]
        if not files:
            raise DataError(f"train: {whole} names no tar.")
        lost = [file for file in files if not file.is_file()]
        if lost:
            some = ", ".join(map(str, lost[:3]))
            raise DataError(f"train: {part}: {len(lost)} of {len(files)} tars are missing, such as {some}.")
        found += files
    return found


def expand_braces(pattern: str) -> list[str]:
    """Names of `a{000..120}b` and of `a{x,y}b`, in order.

    Raises:
        DataError: a brace has neither form.
    """
    before, opened, rest = pattern.partition("{")
    if not opened:
        return [pattern]
    inside, closed, after = rest.partition("}")
    low, dots, high = inside.partition("..")
    if closed and dots and low.isdigit() and high.isdigit() and int(low) <= int(high):
        width = len(low) if low.startswith("0") else 0
        inner = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    elif closed and "," in inside and not dots:
        inner = inside.split(",")
    else:
        raise DataError(f"train: {pattern}: expected {{first..last}} or {{one,other}} in braces.")
    return [before + each + end for end in expand_braces(after) for each in inner]


def too_few_shards(shards: int, ranks: int, workers: int) -> None:
    """Say that readers share shards: nobody goes without, but files are read by several."""
    readers = ranks * max(workers, 1)
    if shards < readers:
        rank_zero_warn(
            f"{shards} shards for {readers} readers ({ranks} ranks with {max(workers, 1)} workers each): "
            "several read from one file, so make at least as many shards as readers if reading is slow."
        )


def usable(pairs: TextPairs, source: str) -> TextPairs:
    """The pairs, if there are any.

    Raises:
        DataError: there are none.
    """
    if not len(pairs):  # type: ignore[arg-type]
        raise DataError(f"{source} has no pair of a picture and a caption.")
    return pairs
