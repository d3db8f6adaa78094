r"""Names that users, data sets and other people's files bring, made harmless for what shows them.

Every writer and report passes through here: a class may be called `=HYPERLINK(...)`, a file `a|b` or
`caf\xe9.jpg` in an encoding that is not UTF-8.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from featherlight_tables import printable, readable

__all__ = ["cells", "json_text", "markdown", "plotted", "printable", "readable"]

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_MARKDOWN = re.compile(r"[\\`*\[\]|]")


def cells(row: Iterable[Any]) -> list[Any]:
    """A row for `csv.writer`: text that a spreadsheet would calculate gets an apostrophe in front.

    Numbers stay as they are, also those that are formatted as text.

    >>> cells([3, -0.5, "-0.5", "=1+1", None, "cat"])
    [3, -0.5, '-0.5', "'=1+1", None, 'cat']
    """
    return [_cell(value) if isinstance(value, str) else value for value in row]


def _cell(text: str) -> str:
    text = readable(text)
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text.strip()


def plotted(text: str) -> str:
    """`text` for a title of matplotlib, to which `$` begins a formula."""
    return printable(text).replace("$", r"\$")


def markdown(text: str) -> str:
    r"""`text` for a cell of a Markdown table.

    >>> markdown("a|b <i>")
    'a\\|b &lt;i&gt;'
    """
    text = _MARKDOWN.sub(r"\\\g<0>", printable(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON in valid UTF-8, strings `readable`.

    Raises:
        ValueError: a number in it is not finite, for which JSON has no word.
    """
    return json.dumps(_readable(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _readable(value: Any) -> Any:
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, Mapping):
        return {_readable(key): _readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    return value
