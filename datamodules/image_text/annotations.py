"""Lists of pictures and sentences about them, in the layouts that are published."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.reading import DataError


class Record(NamedTuple):
    """A picture, the sentences about it, and where that was said.

    Args:
        path: of the picture, as the file has it.
        captions: without the empty ones.
        where: file and place, for messages.
    """

    path: str
    captions: tuple[str, ...]
    where: str


def read_csv(file: Path, image_key: str, caption_key: str, separator: str) -> Iterator[Record]:
    """Rows of a table with a header line, as open_clip's training takes it.

    Raises:
        DataError: there is no such column, or a line has another number of cells.
    """
    csv.field_size_limit(1 << 24)
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines, delimiter=separator)
        header = next(rows, [])
        for option, key in (("image_key", image_key), ("caption_key", caption_key)):
            if key not in header:
                raise DataError(
                    f"{file} has no column '{key}' ({option}); with separator {separator!r} its first line "
                    f"is: {', '.join(header)[:120]}."
                )
        image, caption = header.index(image_key), header.index(caption_key)
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{where} has {len(row)} cells, expected {len(header)} as in the first line.")
            yield _record(row[image], row[caption], where)


def json_line(line: bytes, image_key: str, caption_key: str, where: str) -> Record:
    """A line of JSON, such as DeCLIP's list of YFCC15M-V2; a list of captions is one of sentences.

    Raises:
        DataError: it is none, or lacks a key.
    """
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}).") from error
    for key in (image_key, caption_key):
        if not isinstance(entry, dict) or key not in entry:
            raise DataError(f"{where} has no '{key}', expected an object with {image_key} and {caption_key}.")
    return _record(entry[image_key], entry[caption_key], where)


def read_karpathy(file: Path, split: Sequence[str]) -> Iterator[Record]:
    """Pictures of Karpathy's splits of COCO and Flickr, or of a flat list of `image` and `caption`.

    Args:
        file: `{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}`, or a list.
        split: such as `("train", "restval")`; a flat list has none.

    Raises:
        DataError: it is neither, or has no picture of the split.
    """
    content = _json(file)
    if isinstance(content, list):
        for number, entry in enumerate(content):
            where = f"{file}, entry {number}"
            yield _record(_entry(entry, "image", where), _entry(entry, "caption", where), where)
        return
    images = _entry(content, "images", str(file))
    found = {entry.get("split") for entry in images if isinstance(entry, dict)}
    if not found & set(split):
        raise DataError(
            f"{file} has no picture of the split {' or '.join(split)}; its splits are "
            f"{', '.join(sorted(map(str, found))) or 'none'}."
        )
    for number, entry in enumerate(images):
        where = f"{file}, image {number}"
        if _entry(entry, "split", where) in split:
            folder, name = entry.get("filepath", ""), _entry(entry, "filename", where)
            sentences = [_entry(each, "raw", where) for each in _entry(entry, "sentences", where)]
            yield _record(f"{folder}/{name}" if folder else name, sentences, where)


def read_coco(file: Path) -> Iterator[Record]:
    """Pictures of COCO's `captions_*.json`.

    Raises:
        DataError: it is none.
    """
    content = _json(file)
    names: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    for number, image in enumerate(_entry(content, "images", str(file))):
        where = f"{file}, image {number}"
        names[_entry(image, "id", where)] = _entry(image, "file_name", where)
    for number, entry in enumerate(_entry(content, "annotations", str(file))):
        where = f"{file}, annotation {number}"
        owner = _entry(entry, "image_id", where)
        if owner not in names:
            raise DataError(f"{where}: image_id {owner} is none of its images.")
        captions.setdefault(owner, []).append(_entry(entry, "caption", where))
    for key, texts in captions.items():
        yield _record(names[key], texts, f"{file}, image {key}")


def with_captions(records: Iterable[Record], skip: bool) -> tuple[list[Record], int]:
    """Records that have a caption, and how many had none.

    Raises:
        DataError: one has none and `skip` is false.
    """
    kept, empty = [], 0
    for record in records:
        if record.captions:
            kept.append(record)
        elif skip:
            empty += 1
        else:
            raise DataError(
                f"{record.where}: the caption is empty; expected a sentence, or on_error: skip to "
                "leave it out."
            )
    return kept, empty


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}).") from error


def _entry(owner: Any, key: str, where: str) -> Any:
    if not isinstance(owner, dict) or key not in owner:
        raise DataError(f"{where} has no '{key}'.")
    return owner[key]


def _record(path: Any, captions: Any, where: str) -> Record:
    texts = captions if isinstance(captions, list) else [captions]
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where}: {path!r} is no path of a picture.")
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{where}: a caption is {text!r}, expected a sentence.")
    return Record(path, tuple(text.strip() for text in texts if text.strip()), where)


class Strings(Sequence[str]):
    """Many strings in one piece of memory, which forked readers share: millions of objects would be copied.

    Args:
        items: the strings.
    """

    def __init__(self, items: Iterable[str]) -> None:
        content, ends = bytearray(), [0]
        for item in items:
            content += item.encode("utf-8", "surrogateescape")
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.asarray(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._content[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")
