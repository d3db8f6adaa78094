"""Rows of GLUE's TSVs, of tables of `datasets`, and of texts that were generated; none is ever quoted."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.glue.tasks import Task
from datamodules.reading import DataError, OnError
from datamodules.text.corpora import HUB, hub_table, opened
from datamodules.text.corpora import read_table as read_saved_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A sentence, or two, with what is known of it.

    Attributes:
        sentences: one or two.
        label: class, or score; None where it is not known.
        probabilities: of all classes, where a teacher has given them.
    """

    sentences: tuple[str, ...]
    label: int | float | None = None
    probabilities: tuple[float, ...] | None = None


def tsv_rows(path: Path, columns: dict[str, int] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of a TSV; quotation marks are text.

    Args:
        path: of the file.
        columns: place of each name where the file has no header; the file then has one more than the last.

    Raises:
        CorruptSampleError: it is no UTF-8.
    """
    with opened(path, newline="\n") as lines:
        width: int | None = None if columns is None else max(columns.values()) + 1
        names: list[str] = []
        for number, line in enumerate(lines, start=1):
            cells = line.rstrip("\r\n").split("\t")
            if columns is None and not names:
                names, width = cells, len(cells)
                continue
            if not line.strip():
                continue
            if len(cells) != width:
                yield number, {"": f"{len(cells)} columns, expected {width}"}
            elif columns is None:
                yield number, dict(zip(names, cells, strict=True))
            else:
                yield number, {name: cells[place] for name, place in columns.items()}


def read_tsv(path: Path, task: Task, split: str, on_error: OnError = "raise") -> list[Example]:
    """The examples of an official TSV.

    Args:
        path: of the file.
        task: that it is of.
        split: `train`, `val` or `test`; labels are expected in the first two.
        on_error: whether a malformed row stops, or is left out and counted.

    Raises:
        DataError: a row has another number of columns, an empty sentence or a label that the task has not;
            names file and line. Or a column is missing.
    """
    fixed = task.columns.get(split)
    examples, skipped = [], 0
    for number, row in tsv_rows(path, None if fixed is None else dict(fixed)):
        try:
            examples.append(_example(row, task, split != "test", f"{path}, line {number}"))
        except DataError:
            if on_error == "raise":
                raise
            skipped += 1
    if skipped:
        log.warning("%s: %d malformed rows are left out.", path, skipped)
    return examples


def _example(row: dict[str, str], task: Task, labelled: bool, where: str) -> Example:
    if "" in row:
        raise DataError(f"{where}: {row['']} (a TSV without quoting: a tab ends a column).")
    names = task.sentences
    wanted = (*names, task.label) if labelled else names
    lacking = [name for name in wanted if name not in row]
    if lacking:
        raise DataError(f"{where}: there is no column '{lacking[0]}', only {', '.join(row)}.")
    label = label_of(row[task.label], task, where) if labelled else None
    return Example(tuple(row[name].strip() for name in names), label)


def label_of(text: Any, task: Task, where: str) -> int | float | None:
    """A label as a number.

    Raises:
        DataError: the task has no such label; names the place.
    """
    if task.classes is None:
        try:
            score = float(text)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= 5:
            raise DataError(f"{where}: the score is {text!r}, expected a number in 0 to 5.")
        return score
    if isinstance(text, str) and text in task.classes:
        return task.classes.index(text)
    try:
        number = int(text)
    except (TypeError, ValueError):
        number = -1
    if (task.words and isinstance(text, str)) or not 0 <= number < len(task.classes):
        expected = ", ".join(task.classes) if task.words else f"0 to {len(task.classes) - 1}"
        raise DataError(f"{where}: the label is {text!r}, expected {expected}.")
    return number


def read_table(source: str | Path, task: Task, split: str, part: str) -> list[Example]:
    """The examples of a split that `datasets` saved, of the hub's parquet files, or of the hub itself.

    Args:
        source: folder that holds a saved data set, or the hub's folder of the task, or `hub:owner/name`.
        task: that it is of.
        split: `train`, `val` or `test`.
        part: of the split.

    Raises:
        DataError: a column is missing, or a label is none of the task's; names the row.
        FileNotFoundError: the split is not there.
    """
    name = task.hub_split(split, part)
    table, where = table_of(source, task.hub, name)
    lacking = [c for c in (*task.hub_sentences, "label") if c not in table.column_names]
    if lacking:
        raise DataError(f"{where}: there is no column '{lacking[0]}', only {', '.join(table.column_names)}.")
    examples = []
    for number, row in enumerate(table, start=1):
        known = row["label"] is not None and row["label"] != -1 and split != "test"
        label = label_of(row["label"], task, f"{where}, row {number}") if known else None
        if split != "test" and label is None:
            raise DataError(f"{where}, row {number}: there is no label ({row['label']!r}).")
        examples.append(Example(tuple(str(row[c]).strip() for c in task.hub_sentences), label))
    return examples


def table_of(source: str | Path, configuration: str, split: str) -> tuple[Any, str]:
    """A split's table, and what to call it: of a saved data set, of parquet files, or of the hub.

    Args:
        source: see `read_table`.
        configuration: the hub's name of the task; a folder may hold several of them.
        split: the hub's name of the split.

    Raises:
        FileNotFoundError: it is not there.
    """
    if str(source).startswith(HUB):
        name = f"{str(source).removeprefix(HUB)}/{configuration}/{split}"
        return hub_table(name), f"{HUB}{name}"
    for folder in (Path(source) / configuration, Path(source)):
        if (folder / "dataset_dict.json").is_file() and (folder / split).is_dir():
            return read_saved_table(folder / split), str(folder / split)
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            return read_saved_table(files), str(folder / f"{split}-*.parquet")
    raise FileNotFoundError(
        f"There is no {split} split in {source}: expected a folder that `datasets` saved, or files "
        f"{configuration}/{split}-*.parquet."
    )


def is_table(source: Path, task: Task) -> bool:
    """Whether a folder holds tables of the task, not TSVs."""
    folders = (source / task.hub, source)
    return any((f / "dataset_dict.json").is_file() or any(f.glob("*-*.parquet")) for f in folders)


def read_generated(path: Path, classes: int) -> list[Example]:
    """What `GeneratedTextWriter` wrote: sentences with a teacher's label and probabilities.

    Args:
        path: of a `generated.tsv`.
        classes: of the task.

    Raises:
        DataError: a row is malformed, or the file is of another number of classes; names file and line.
    """
    names = [f"p_{number}" for number in range(classes)]
    examples = []
    for number, row in tsv_rows(path):
        where = f"{path}, line {number}"
        if "" in row:
            raise DataError(f"{where}: {row['']}.")
        lacking = [name for name in ("sentence", "label", *names) if name not in row]
        if lacking or f"p_{classes}" in row:
            raise DataError(
                f"{where}: a text that was generated for {classes} classes has the columns sentence, label, "
                f"{', '.join(names)}; this one has {', '.join(row)}."
            )
        numbers = _numbers([row["label"], *(row[name] for name in names)], where)
        label, probabilities = numbers[0], numbers[1:]
        if label not in range(classes) or abs(sum(probabilities) - 1) > 1e-3 or min(probabilities) < 0:
            raise DataError(f"{where}: label {row['label']} with probabilities {probabilities} of no sum 1.")
        examples.append(Example((row["sentence"],), int(label), tuple(probabilities)))
    return examples


def _numbers(cells: Sequence[str], where: str) -> list[float]:
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError as error:
        raise DataError(f"{where}: {error}.") from error
    if not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: a number is not finite.")
    return numbers
