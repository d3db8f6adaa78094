"""Tables of what `test` found: reading `results.json`, numbers with units, several runs side by side.

It imports nothing heavy, so that `featherlight results` answers at once.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RESERVED = (
    "stage",
    "metrics",
    "device",
    "versions",
    "checkpoint",
    "weights",
    "synthetic_data",
    "add_bos",
    "seed",
    "date",
)
"""Keys of a report that are no callback's part."""
FORMS = ("table", "csv", "markdown", "latex")
NO_RESULTS = "no results.json: `featherlight test` writes it"

_METRICS = ("top1", "AP", "accuracy", "perplexity", "mAP", "R@1", "miou", "auroc", "AUROC")
"""What a run is judged by, the first that it has; else the first of its metrics."""
_SEED = re.compile(r"seed[_-]?\d+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


# Text


def readable(text: str) -> str:
    r"""`text` as valid Unicode: bytes of a file name that are not UTF-8 become `\xe9`.

    >>> readable("caf\udce9.jpg")
    'caf\\xe9.jpg'
    """
    return _SURROGATE.sub(_backslashed, text)


def printable(text: str) -> str:
    """`readable`, with control characters as escapes too: what a terminal may be sent, on one line."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), readable(text))


def _backslashed(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of `outer/inner` name and value of a nested report; lists stay whole."""
    for key, value in values.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        else:
            yield name, value


def human(name: str, value: Any) -> str:
    """`value` as a person reads it, with the unit that `name` ends in.

    >>> human("efficiency/macs", 1_814_073_344), human("latency_seconds", 0.0032), human("bytes", 46_800_000)
    ('1.81 G', '3.2 ms', '46.8 MB')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        short = len(value) <= 4 and not any(isinstance(item, (list, dict)) for item in value)
        return ", ".join(human(name, item) for item in value) if short else f"{len(value)} values"
    key = name.rpartition("/")[2]
    if key.endswith("_per_second"):
        return f"{_scaled(value)}/s"
    if key.endswith("seconds"):
        return _duration(value)
    if "bytes" in key.split("_"):
        return f"{_scaled(value)}B"
    if isinstance(value, int):
        return _scaled(value) if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}"


def _scaled(value: float) -> str:
    """Three digits and a metric prefix: `11.7 M`."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{float(f'{value / factor:.3g}'):g} {prefix}"
    return f"{float(f'{value:.3g}'):g} "


def _duration(seconds: float) -> str:
    """Three digits and a unit of time: `3.2 ms`."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= 0.9995 * factor:
            return f"{float(f'{seconds / factor:.3g}'):g} {unit}"
    return f"{float(f'{seconds / 1e-6:.3g}'):g} us"


# Reading


def read_report(file: Path) -> dict[str, Any]:
    """A `results.json`.

    Raises:
        ValueError: it is none; names the file.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is damaged or no JSON: {error}.") from error
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict):
        raise ValueError(f"'{file}' is no report of `featherlight test`: it has no `metrics`.")
    return report


@dataclass
class Row:
    """One run, or several that differ in their seed alone.

    Attributes:
        name: of the run's folder.
        numbers: `section/name` to the values, one a seed; empty where there are no results.
        device: that they were taken on.
    """

    name: str
    numbers: dict[str, list[Any]] = field(default_factory=dict)
    device: str = ""

    def text(self, name: str) -> str:
        """A value with its unit; of several seeds their mean and sample standard deviation."""
        values = self.numbers.get(name, [])
        if len(values) < 2 or not all(_is_number(value) for value in values):
            return human(name, values[0]) if values else "-"
        mean = statistics.fmean(values)
        return f"{human(name, mean)} ± {human(name, statistics.stdev(values))}"

    def mean(self, name: str) -> float | None:
        """The number itself, None where there is none."""
        values = self.numbers.get(name, [])
        return statistics.fmean(values) if values and all(_is_number(value) for value in values) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_runs(runs: Iterable[Path]) -> list[Row]:
    """The rows of a table.

    A folder without a `results.json` stands for those below it; runs in folders `seed_0`, `seed_1`, ... of
    one folder are one row.

    Raises:
        FileNotFoundError: a run is not there.
        ValueError: a file is no report.
    """
    rows: dict[Path, Row] = {}
    for run in runs:
        if not run.exists():
            raise FileNotFoundError(f"There is no run '{run}'.")
        below = (
            sorted(run.rglob("results.json")) if run.is_dir() and not (run / "results.json").exists() else []
        )
        for file in [run] if run.is_file() else below or [run / "results.json"]:
            folder = file.parent if file.is_file() else run
            owner = folder.parent if _SEED.fullmatch(folder.name) else folder
            row = rows.setdefault(owner, Row(str(owner)))
            if file.is_file():
                _add(row, read_report(file))
    return _named(list(rows.values()))


def _add(row: Row, report: Mapping[str, Any]) -> None:
    sections = {"": report["metrics"]} | {
        key: part for key, part in report.items() if key not in RESERVED and isinstance(part, dict)
    }
    for key, part in sections.items():
        for name, value in flatten(part, key):
            if "/layers/" not in name:
                row.numbers.setdefault(name, []).append(value)
    device = report.get("device")
    row.device = str(device.get("name", "")) if isinstance(device, dict) else ""


def _named(rows: list[Row]) -> list[Row]:
    """Rows without the folders that all of them are in."""
    if len(rows) > 1:
        common = os.path.commonpath([os.path.abspath(row.name) for row in rows])
        for row in rows:
            row.name = os.path.relpath(os.path.abspath(row.name), common)
    elif rows:
        below = os.path.relpath(rows[0].name)
        rows[0].name = min(rows[0].name, below, key=len)
    for row in rows:
        seeds = max((len(values) for values in row.numbers.values()), default=1)
        row.name = printable(row.name) + (f" ({seeds} seeds)" if seeds > 1 else "")
    return rows


# Several runs side by side


def columns(rows: Sequence[Row], everything: bool = False) -> dict[str, str]:
    """Heading to `section/name` of the numbers that a table shows.

    Six by default: what the runs are judged by, size, MACs, latency, throughput (the device stands below the
    table where it is one).
    """
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    if everything:
        return {name: name for name in names}
    shown = {}
    for row in rows:
        if (judged := _judged_by(row)) is not None:
            shown[judged.partition("/")[2] or judged] = judged
    for heading, pattern in (
        ("size", r"(.*/)?bytes_on_disk"),
        ("MACs", r"(.*/)?macs"),
        ("latency", r"(.*/)?latency_seconds"),
        ("throughput", r"(.*/)?throughput_.*_per_second"),
    ):
        found = [name for name in names if re.fullmatch(pattern, name)]
        # where all of them were tested in a runtime, what it ran is compared, not the network in torch
        measured = [row for row in rows if row.numbers]
        ran = [n for n in found if n.startswith("onnxruntime/") and all(n in row.numbers for row in measured)]
        if found := ran or found:
            kind = re.search(r"throughput_(.*)_per_second", found[0])
            shown[f"{kind[1]} per second" if kind else heading] = found[0]
    return shown


def _judged_by(row: Row) -> str | None:
    metrics = [name for name in row.numbers if name.startswith(("test/", "val/"))]
    for wanted in _METRICS:
        for name in metrics:
            if name.rpartition("/")[2] == wanted:
                return name
    return next(iter(metrics), None)


def change(row: Row, first: Row, name: str) -> float | None:
    """By what share a number is above the first run's; None where either is missing or nothing to compare."""
    ours, base = row.mean(name), first.mean(name)
    if row is first or ours is None or base is None or base == 0 or not math.isfinite(ours / base):
        return None
    return ours / base - 1


def render(
    runs: Iterable[Path],
    everything: bool = False,
    form: Literal["table", "csv", "markdown", "latex"] = "table",
    width: int | None = None,
) -> str:
    """One table of several runs, a row a run, with the change against the first in percent.

    Args:
        runs: folders, or their `results.json`.
        everything: all numbers, a row a number, instead of the six that matter.
        form: for a terminal, a spreadsheet, a README or a paper.
        width: characters of the terminal; None asks it.

    Raises:
        FileNotFoundError: a run is not there.
        ValueError: a file is no report.
    """
    rows = read_runs(runs)
    shown = columns(rows, everything)
    if form == "csv":
        return _as_csv(rows, shown)
    devices = sorted({row.device for row in rows if row.device})
    heads = ["run", *shown, *(["device"] if len(devices) > 1 else [])]
    body = []
    for row in rows:
        if not row.numbers:
            body.append([row.name, NO_RESULTS, *[""] * (len(heads) - 2)][: max(len(heads), 2)])
            continue
        cells = [_cell(row, rows[0], name, form) for name in shown.values()]
        body.append([row.name, *cells, *([printable(row.device)] if len(devices) > 1 else [])])
    if everything:
        body = [list(cells) for cells in zip(*[heads, *body], strict=True)] if body else []
        heads, body = body[0], body[1:]
    caption = f"on {printable(devices[0])}" if len(devices) == 1 else ""
    if form == "markdown":
        return _as_markdown(heads, body) + (f"\n{caption}\n" if caption else "")
    if form == "latex":
        return _as_latex(heads, body)
    said = "" if everything else in_words(rows, shown)
    room = width or shutil.get_terminal_size().columns
    return _as_text(heads, body, caption, width) + "".join(f"{line}\n" for line in textwrap.wrap(said, room))


def in_words(rows: Sequence[Row], shown: Mapping[str, str]) -> str:
    """What the last of several runs has gained or lost against the first; empty where nothing compares.

    >>> alone, distilled = Row("alone", {"test/top1": [0.4]}), Row("distilled", {"test/top1": [0.5]})
    >>> in_words([alone, distilled], {"top1": "test/top1"})
    'distilled against alone: top1 0.5 for 0.4 (+10 points).'
    """
    measured = [row for row in rows if row.numbers]
    if len(measured) < 2:
        return ""
    first, last = measured[0], measured[-1]
    parts = []
    for heading, name in shown.items():
        ours, base = last.mean(name), first.mean(name)
        if ours is None or base is None or base <= 0 or not math.isfinite(ours / base):
            continue
        if name.startswith(("test/", "val/")):
            fraction = 0 <= ours <= 1 and 0 <= base <= 1
            gain = f"{100 * (ours - base):+.3g} points" if fraction else f"{100 * (ours / base - 1):+.3g} %"
            parts.append(f"{heading} {human(name, ours)} for {human(name, base)} ({gain})")
        elif heading == "latency" and (
            same := last.mean(f"{name.rpartition('/')[0]}/float32_{heading}_seconds")
        ):
            parts.append(f"{ours / same:.2g} times the {heading} of its float32 form")  # timed in turns
        elif heading in ("size", "latency"):
            parts.append(f"{ours / base:.2g} times the {heading}")
    return f"{last.name} against {first.name}: {', '.join(parts)}." if parts else ""


def _cell(row: Row, first: Row, name: str, form: str) -> str:
    text = printable(row.text(name))
    share = change(row, first, name)
    if share is None:
        return text
    return f"{text}{' ' if form != 'table' else chr(10)}({100 * share:+.3g} %)"


def _as_text(heads: Sequence[str], body: Sequence[Sequence[str]], caption: str, width: int | None) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    output = io.StringIO()
    available = width or Console().width
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), pad_edge=False, collapse_padding=True)
    for place, head in enumerate(heads):
        # a name is cut in a way that says so, rather than broken across lines
        widest = max(available // 3, 12) if place == 0 else None
        justify: Literal["left", "right"] = "left" if place == 0 else "right"
        table.add_column(
            Text(head), overflow="ellipsis", no_wrap=place == 0, max_width=widest, justify=justify
        )
    notes = []
    for cells in body:
        if len(cells) > 1 and cells[1] == NO_RESULTS:
            notes.append(f"{cells[0]}: {NO_RESULTS}")
            cells = [cells[0], *["-"] * (len(heads) - 1)]
        table.add_row(*(Text(cell) for cell in cells))
    Console(file=output, width=available).print(table)
    return "\n".join(line.rstrip() for line in [*output.getvalue().splitlines(), *notes]).strip("\n") + "\n"


def _as_csv(rows: Sequence[Row], shown: Mapping[str, str]) -> str:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    names = list(shown.values())
    writer.writerow(["run", *names, *(f"{name} change" for name in names), "seeds", "device"])
    for row in rows:
        seeds = max((len(values) for values in row.numbers.values()), default=0)
        means = [row.mean(name) for name in names]
        texts = [_spreadsheet(row.text(n)) if m is None else m for n, m in zip(names, means, strict=True)]
        changes = [change(row, rows[0], name) for name in names]
        writer.writerow([_spreadsheet(row.name), *texts, *changes, seeds, _spreadsheet(row.device)])
    return output.getvalue()


def _spreadsheet(text: str) -> str:
    text = readable(text)
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t", "\r") or re.match(r"-(?!\d|$)", text) else text


def _as_markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        escaped = (re.sub(r"([\\`*\[\]|<>])", r"\\\1", cell) for cell in cells)
        return f"| {' | '.join(escaped)} |\n"

    rule = "| --- " + "| ---: " * (len(heads) - 1) + "|\n"
    return line(heads) + rule + "".join(line(cells) for cells in body)


def _as_latex(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }

    def line(cells: Iterable[str]) -> str:
        escaped = (
            "".join(special.get(char) or (f"\\{char}" if char in "&%$#_{}" else char) for char in cell)
            for cell in cells
        )
        return f"{' & '.join(escaped)} \\\\\n"

    rows = "".join(line(cells) for cells in body)
    return (
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}\n\\hline\n{line(heads)}\\hline\n{rows}\\hline\n"
        "\\end{tabular}\n"
    )
