"""Outlines of a COCO annotation as masks, checked before anything is built of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.coco.values import number, shown

_FARTHEST = 1e6  # pixels; pycocotools counts in 32 bits
_LONGEST = 1e7  # pixels around a polygon; pycocotools keeps a number for each fifth of one


def decode_segmentation(shape: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Polygons, or compressed or plain run lengths, of a COCO annotation as a mask (height, width).

    Parts of fewer than three points enclose nothing and are left out, see `short_parts`.

    Raises:
        ValueError: it is none of these, or does not fit the picture; begins with "has".
    """
    if not shape:
        return np.zeros((height, width), np.bool_)
    if isinstance(shape, list):
        return _filled(shape, height, width)
    if isinstance(shape, dict) and {"size", "counts"} <= shape.keys():
        return _runs(shape, height, width)
    raise ValueError(
        f"has the segmentation {shown(shape)}; a list of polygons, or run lengths with size and counts, is "
        "needed"
    )


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (height, width) as COCO's compressed run lengths."""
    from pycocotools import mask as coco_mask

    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.bool_), np.uint8))
    return {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode("ascii")}


def short_parts(shape: Any) -> int:
    """How many parts of a list of polygons have fewer than three points."""
    if not isinstance(shape, list):
        return 0
    return sum(isinstance(part, list) and len(part) < 6 for part in _parts(shape))


def _parts(shape: list[Any]) -> list[Any]:
    """The polygons; a list of numbers is one."""
    return shape if not shape or isinstance(shape[0], list) else [shape]


def _filled(shape: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    from pycocotools import mask as coco_mask

    polygons = [_polygon(part) for part in _parts(shape)]
    whole = [polygon for polygon in polygons if len(polygon) >= 6]
    if not whole:
        return np.zeros((height, width), np.bool_)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(whole, height, width))).astype(np.bool_)


def _polygon(part: Any) -> list[float]:
    """A part as x, y, x, y, ..."""
    try:
        values = [number(value) for value in part] if isinstance(part, list) else None
    except ValueError:
        values = None
    if values is None or len(values) % 2:
        raise ValueError(f"has the polygon {shown(part)}; numbers x, y, x, y, ... are needed")
    points = np.array(values).reshape(-1, 2)
    around = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1, initial=0).sum() if values else 0
    if not (np.abs(points) <= _FARTHEST).all() or around > _LONGEST:
        raise ValueError(f"has the polygon {shown(part)}, which lies far outside of any picture")
    return values


def _runs(shape: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """Run lengths go down the columns: of zeros, ones, zeros, ..."""
    size = shape["size"]
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(
            f"has run lengths of the size {shown(size)}, but its picture is {height} high and {width} wide"
        )
    counts = shape["counts"]
    lengths = _plain(counts) if isinstance(counts, list) else _unpacked(counts)
    if lengths is None or any(length < 0 for length in lengths):
        raise ValueError(f"has the run lengths {shown(counts)}, which are none")
    if sum(lengths) != height * width:
        raise ValueError(
            f"has run lengths that add up to {sum(lengths)}, but its picture has {height * width} pixels"
        )
    ones = np.arange(len(lengths)) % 2 == 1
    return np.repeat(ones, lengths).reshape(width, height).T


def _plain(counts: list[Any]) -> list[int] | None:
    try:
        values = [number(value) for value in counts]
    except ValueError:
        return None
    return [int(value) for value in values] if all(value.is_integer() for value in values) else None


def _unpacked(counts: Any) -> list[int] | None:
    """COCO's compressed run lengths: five bits a character, signed, from the third on as differences."""
    text = counts.encode(errors="replace") if isinstance(counts, str) else counts
    if not isinstance(text, bytes) or any(not 48 <= code < 112 for code in text):
        return None
    lengths: list[int] = []
    value = shift = 0
    for code in text:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths if shift == 0 else None
