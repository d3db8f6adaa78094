"""Text as it is published, and token segments cut from it."""

import glob
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

Segmentation = Literal["packed", "random"]
Document = Literal["file", "line"]

HUB = "hub:"
_TOKENS = (".pt", ".npy")
_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def corpus_files(root: Path, source: str) -> list[Path]:
    """Files of a source in sorted order: a file, a folder (its text, or an arrow data set), or a glob.

    Args:
        root: of relative sources.
        source: see `TextDataModule`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = root / Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [path]
        found = [
            file for file in path.iterdir() if file.suffix in (".txt", ".raw") or file.name.endswith(_JSON)
        ]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"There is no text at '{path}': it must be a file, a folder of .txt or .jsonl files, a folder "
            "that "
            "`datasets` saved, or a glob."
        )
    return sorted(found)


def read_documents(
    root: Path, source: str, column: str = "text", document: Document = "file"
) -> Iterator[str]:
    """The documents of a source, one after another.

    Args:
        root: of relative sources.
        source: see `TextDataModule`.
        column: of JSON objects and of tables.
        document: whether a plain text file is one document, or each of its lines is a row (blank ones count).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a line is no JSON object with that column; names file and line.
    """
    if source.startswith(HUB):
        yield from _rows(_hub(source.removeprefix(HUB)), column, source)
        return
    for file in corpus_files(root, source):
        if file.is_dir() or file.suffix in (".arrow", ".parquet"):
            yield from _rows(_table(file), column, str(file))
        elif file.name.endswith(_JSON):
            yield from _json_rows(file, column)
        elif document == "file":
            yield file.read_text(encoding="utf-8")
        else:
            with file.open(encoding="utf-8") as lines:
                yield from (line if line.strip() else "" for line in lines)


def _json_rows(file: Path, column: str) -> Iterator[str]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield str(json.loads(line)[column])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{file}, line {number}: no JSON object with '{column}' ({error})."
                    ) from error


def _hub(name: str) -> Any:
    """`owner/name[/configuration]/split` of the hub."""
    from datasets import load_dataset

    parts = name.split("/")
    if not 3 <= len(parts) <= 4:
        raise MisconfigurationException(
            f"'{HUB}{name}': write {HUB}owner/name/split or {HUB}owner/name/configuration/split."
        )
    return load_dataset("/".join(parts[:2]), *parts[2:-1], split=parts[-1])


def _table(path: Path) -> Any:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise MisconfigurationException(f"Reading '{path}' needs the package `datasets`.") from error
    if path.suffix == ".parquet":
        return Dataset.from_parquet(str(path))
    if path.suffix == ".arrow":
        return Dataset.from_file(str(path))
    found = load_from_disk(str(path))
    if not isinstance(found, Dataset):
        raise MisconfigurationException(
            f"'{path}' holds the splits {', '.join(found)}: name the folder of one of them."
        )
    return found


def _rows(table: Any, column: str, source: str) -> Iterator[str]:
    if column not in table.column_names:
        raise ValueError(f"{source} has no column '{column}', only {', '.join(table.column_names)}.")
    for row in table:
        yield row[column]


def read_tokens(path: Path) -> Tensor:
    """Token ids (tokens,), int64, of a `.pt` or `.npy` file.

    Raises:
        ValueError: it is not one row of integers.
    """
    if path.suffix == ".npy":
        ids = torch.from_numpy(np.load(path, allow_pickle=False))
    else:
        ids = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.squeeze().ndim != 1:
        raise ValueError(f"{path} must hold one row of integer token ids.")
    return ids.squeeze().long()


def is_tokens(source: str) -> bool:
    """Whether a source holds token ids."""
    return source.endswith(_TOKENS)


def packed_segments(ids: Tensor, length: int, count: int | None = None) -> Tensor:
    """Consecutive segments (segments, length) of a stream (tokens,); the tail is dropped.

    Args:
        ids: the whole stream.
        length: tokens of a segment.
        count: take the first so many; None is all.

    Raises:
        ValueError: there are too few tokens; says how many were found and needed.
    """
    needed = length * (count or 1)
    if len(ids) < needed:
        raise ValueError(
            f"The text has {len(ids)} tokens, and {count or 1} segments of {length} need {needed}: give "
            "more text, "
            "fewer or shorter segments."
        )
    whole = len(ids) // length
    return ids[: whole * length].view(whole, length)[:count].clone()


def random_segments(
    documents: Sequence[str], encode: Callable[[str], list[int]], length: int, count: int, seed: int
) -> Tensor:
    """GPTQ's habit for C4: draw documents until one has more than `length` tokens, take a random slice of it.

    Args:
        documents: to draw from, with replacement.
        encode: text to token ids.
        length: tokens of a segment.
        count: segments.
        seed: of the draws.

    Raises:
        ValueError: no document is long enough.
    """
    generator = np.random.default_rng(seed)
    encoded: dict[int, list[int]] = {}
    segments: list[list[int]] = []
    while len(segments) < count:
        place = int(generator.integers(len(documents)))
        if place not in encoded:
            encoded[place] = encode(documents[place])
            if len(encoded) == len(documents) and max(map(len, encoded.values())) <= length:
                longest = max(map(len, encoded.values()))
                raise ValueError(
                    f"None of {len(documents)} documents has more than {length} tokens (the longest has "
                    f"{longest}): "
                    "use segmentation: packed, or a shorter calibration_seq_len."
                )
        ids = encoded[place]
        if len(ids) > length:
            start = int(generator.integers(len(ids) - length))
            segments.append(ids[start : start + length])
    return torch.tensor(segments)
