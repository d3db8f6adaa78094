r"""Names that users, data sets and other people's files bring, made harmless for what shows them.

Every writer and report passes through here: a class may be called `=HYPERLINK(...)`, a file `a|b` or
`caf\xe9.jpg` in an encoding that is not UTF-8.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_MARKDOWN = re.compile(r"[\\`*\[\]|]")


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
