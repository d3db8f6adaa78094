"""Text as it is published, and token segments cut from it."""

import contextlib
import glob
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from datamodules.reading import CorruptSampleError, Listing, list_files, list_glob

log = logging.getLogger(__name__)

Segmentation = Literal["packed", "random"]
Document = Literal["file", "line"]

HUB = "hub:"
_TOKENS = (".pt", ".npy")
_JSON = tuple(f".{kind}{gz}" for kind in ("json", "jsonl", "ndjson") for gz in ("", ".gz"))
_PLAIN = (".txt", ".raw", ".txt.gz", ".raw.gz")
Render = Callable[[list[Any]], str]
"""Makes one text of the messages of a chat."""


def corpus_files(root: Path, source: str) -> list[Path]:
    """Files of a source in sorted order: a file, a folder (the text in and below it, or an arrow data set),
    or a glob; what is hidden is left out, see `datamodules.reading`.

    Args:
        root: of relative sources.
        source: see `TextDataModule`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    return sorted(map(Path, _listed(root, source).names))


def _listed(root: Path, source: str) -> Listing:
    """The paths of a source's files, and how many others were left out."""
    path = root / Path(source).expanduser()
    listing = Listing([])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return Listing([str(path)])
        listing = list_files(path, lambda name: name.lower().endswith(_PLAIN + _JSON))
        listing = listing._replace(names=[str(path / name) for name in listing.names])
    elif path.is_file():
        listing = Listing([str(path)])
    elif glob.has_magic(str(path)):
        listing = list_glob(str(path), lambda name: True)
    if not listing.names:
        raise FileNotFoundError(
            f"There is no text at '{path}'{listing.left_out()}: it must be a file, a folder of .txt or "
            ".jsonl files, a folder that `datasets` saved, or a glob."
        )
    return listing


def read_documents(
    root: Path,
    source: str,
    column: str = "text",
    document: Document = "file",
    render: Render | None = None,
) -> Iterator[str]:
    """The documents of a source, one after another; rows whose text is null are counted and left out.

    Args:
        root: of relative sources.
        source: see `TextDataModule`.
        column: of JSON objects and of tables.
        document: whether a plain text file is one document, or each of its lines is a row (blank ones count).
        render: for columns that hold chats; None refuses them.

    Raises:
        FileNotFoundError: nothing is there.
        CorruptSampleError: a file cannot be read, or is no UTF-8; names it.
        ValueError: a line is no JSON object with that column, or it holds no text; names file and line.
    """
    if source.startswith(HUB):
        yield from _texts(_rows(hub_table(source.removeprefix(HUB)), column, source), source, column, render)
        return
    listing = _listed(root, source)
    if left_out := listing.left_out():
        log.info("%s: %d files%s.", source, len(listing.names), left_out)
    for file in sorted(map(Path, listing.names)):
        if file.is_dir() or file.suffix.lower() in (".arrow", ".parquet"):
            yield from _texts(_rows(read_table(file), column, str(file)), file, column, render)
        elif file.name.lower().endswith(_JSON):
            yield from _texts(_json_rows(file, column), file, column, render)
        else:
            yield from _plain(file, document)


def _texts(
    rows: Iterable[tuple[str, Any]], source: str | Path, column: str, render: Render | None
) -> Iterator[str]:
    """The texts of rows (where each stands, its value)."""
    missing = broken = 0
    for where, value in rows:
        if value is None:
            missing += 1
        elif isinstance(value, str):
            text = value.encode("utf-8", "replace").decode() if _has_surrogates(value) else value
            broken += text is not value
            yield text
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield str(value)
        elif isinstance(value, list) and render is not None:
            yield _rendered(render, value, f"{source}, {where}")
        else:
            chat = isinstance(value, list) and value and isinstance(value[0], dict)
            remedy = ": set chat: true to apply the tokenizer's chat template" if chat else ""
            raise ValueError(
                f"{source}, {where}: '{column}' holds {'messages' if chat else f'a {type(value).__name__}'}, "
                f"not a text{remedy}."
            )
    for count, what in (
        (missing, f"rows have no '{column}' (null) and are left out"),
        (broken, "texts hold halves of characters (lone surrogates), which became '?'"),
    ):
        if count:
            log.warning("%s: %d %s.", source, count, what)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _rendered(render: Render, messages: list[Any], where: str) -> str:
    try:
        return render(messages)
    except Exception as error:  # a template is a program of its author's
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: the chat template does not take these messages ({reason}).") from error


@contextlib.contextmanager
def opened(file: Path, newline: str | None = None) -> Iterator[Iterator[str]]:
    """The lines of a text file, compressed or not.

    Args:
        file: its path.
        newline: what ends a line, as Python's `open` has it.

    Raises:
        CorruptSampleError: it is damaged, or no UTF-8.
    """
    opener: Any = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline=newline) as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise CorruptSampleError(
            f"{file} is not a text in UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}): "
            "convert it first, for instance with iconv."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptSampleError(f"{file} is damaged or no gzip file ({error}).") from error


def _plain(file: Path, document: Document) -> Iterator[str]:
    with opened(file) as lines:
        if document == "file":
            yield "".join(lines)
        else:
            yield from (line if line.strip() else "" for line in lines)


def _json_rows(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    value = json.loads(line)[column]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(
                        f"{file}, line {number}: no JSON object with '{column}' ({error})."
                    ) from error
                yield f"line {number}", value


def hub_table(name: str) -> Any:
    """The table `owner/name[/configuration]/split` of the hub.

    Raises:
        MisconfigurationException: the name has another form, or it cannot be loaded.
    """
    from datasets import load_dataset

    parts = name.split("/")
    if not 3 <= len(parts) <= 4:
        raise MisconfigurationException(
            f"'{HUB}{name}': write {HUB}owner/name/split or {HUB}owner/name/configuration/split."
        )
    try:
        return load_dataset("/".join(parts[:2]), *parts[2:-1], split=parts[-1], trust_remote_code=False)
    except Exception as error:  # the network, the hub and each format fail in their own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MisconfigurationException(f"'{HUB}{name}' cannot be loaded: {reason}") from error


def read_table(path: Path | list[Path]) -> Any:
    """A table on disk: `.parquet` files, `.arrow`, or a folder that `datasets` saved.

    Raises:
        CorruptSampleError: it cannot be read.
        MisconfigurationException: it holds several splits, or `datasets` is missing.
    """
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise MisconfigurationException(f"Reading '{path}' needs the package `datasets`.") from error
    try:
        if isinstance(path, list) or path.suffix.lower() == ".parquet":
            files = path if isinstance(path, list) else [path]
            return Dataset.from_parquet([str(file) for file in files])
        found = Dataset.from_file(str(path)) if path.suffix.lower() == ".arrow" else load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise nearly anything on damaged files
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise CorruptSampleError(f"cannot read the table {path} ({reason}).") from error
    if not isinstance(found, Dataset):
        raise MisconfigurationException(
            f"'{path}' holds the splits {', '.join(found)}: name the folder of one of them."
        )
    return found


def _rows(table: Any, column: str, source: str) -> Iterator[tuple[str, Any]]:
    if column not in table.column_names:
        raise ValueError(f"{source} has no column '{column}', only {', '.join(table.column_names)}.")
    for number, row in enumerate(table, start=1):
        yield f"row {number}", row[column]


def read_tokens(path: Path) -> Tensor:
    """Token ids (tokens,), int64, of a `.pt` or `.npy` file.

    Raises:
        CorruptSampleError: it cannot be read.
        ValueError: it is not one row of integers.
    """
    try:
        if path.suffix == ".npy":
            ids = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            ids = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # both raise nearly anything on damaged files, and advise to run code
        raise CorruptSampleError(
            f"{path} is damaged, or holds no token ids as {'numpy' if path.suffix == '.npy' else 'torch'} "
            "writes them."
        ) from error
    if (
        not isinstance(ids, Tensor)
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
        or ids.numel() != max(ids.shape, default=0)
    ):
        raise ValueError(f"{path} must hold one row of integer token ids.")
    return ids.flatten().long()


def is_tokens(source: str) -> bool:
    """Whether a source holds token ids."""
    return source.endswith(_TOKENS)


def packed_segments(ids: Tensor, length: int, count: int | None = None, name: str = "The text") -> Tensor:
    """Consecutive segments (segments, length) of a stream (tokens,); the tail is dropped.

    Args:
        ids: the whole stream.
        length: tokens of a segment.
        count: take the first so many; None is all.
        name: of the text, for the error.

    Raises:
        ValueError: there are too few tokens; says how many were found and needed.
    """
    needed = length * (count or 1)
    if len(ids) < needed:
        raise ValueError(
            f"{name} has {len(ids)} tokens, and {count or 1} segments of {length} need {needed}: give "
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
    if not documents:
        raise ValueError("The calibration text has no document.")
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
