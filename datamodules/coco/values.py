"""Single values of a COCO file, as exporters write them, turned into what they mean.

What has no clear meaning is a `ValueError` that begins with "has", so that whoever knows the file and the
entry can put them in front.
"""

import math
import re
import reprlib
from typing import Any

_LARGEST_SIZE = 2**31 - 1
_DIGITS = re.compile(r"-?[0-9]{1,40}")
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "": False}


def shown(value: Any) -> str:
    """A value in one short line."""
    return reprlib.repr(value)


def identifier(entry: dict[str, Any], field: str) -> int | str:
    """An id that can be compared: `7`, `7.0` and `"7"` are the same, other texts are themselves."""
    value = entry[field]
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if _DIGITS.fullmatch(text) else text
    raise ValueError(f"has the {field} {shown(value)}; a whole number or a text is needed")


def text(entry: dict[str, Any], field: str) -> str:
    """A name; numbers are written out."""
    value = entry[field]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError(f"has the {field} {shown(value)}; a text is needed")


def number(value: Any) -> float:
    """A number, or a text that is one.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    raise ValueError("no number")


def extent(entry: dict[str, Any], field: str) -> int:
    """A height or width in pixels; 0 where the file does not say."""
    value = entry.get(field)
    try:
        pixels = 0.0 if value is None or value == "" else number(value)
    except ValueError:
        pixels = math.nan
    if not (0 <= pixels <= _LARGEST_SIZE and pixels.is_integer()):
        raise ValueError(f"has the {field} {shown(value)}; a whole number of pixels, or null, is needed")
    return int(pixels)


def box(entry: dict[str, Any]) -> tuple[float, ...]:
    """`bbox` as x, y, width, height."""
    value = entry["bbox"]
    try:
        numbers = tuple(number(side) for side in value) if isinstance(value, list) else ()
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or numbers[2] < 0 or numbers[3] < 0:
        raise ValueError(
            f"has the bbox {shown(value)}; four finite numbers x, y, width, height are needed, and no "
            "negative width or height"
        )
    return numbers


def area(entry: dict[str, Any], otherwise: float) -> float:
    """`area` in pixels, also as a list of one; `otherwise` where the file does not say."""
    value = entry.get("area")
    if value is None or value == "":
        return otherwise
    try:
        pixels = number(value[0] if isinstance(value, list) and len(value) == 1 else value)
    except ValueError:
        pixels = math.nan
    if not 0 <= pixels < math.inf:
        raise ValueError(f"has the area {shown(value)}; a number of pixels, or null, is needed")
    return pixels


def crowd(entry: dict[str, Any]) -> bool:
    """`iscrowd`; not, where the file does not say."""
    value = entry.get("iscrowd")
    if value is None or isinstance(value, bool):
        return bool(value)
    flag = value.strip().lower() if isinstance(value, str) else value
    if isinstance(flag, (int, float)) and flag in (0, 1):
        return bool(flag)
    if isinstance(flag, str) and flag in _FLAGS:
        return _FLAGS[flag]
    raise ValueError(f"has the iscrowd {shown(value)}; 0, 1 or null is needed")
