"""A detector's boxes, in COCO's results format, by picture."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.coco import values
from datamodules.coco.values import shown
from datamodules.reading import DataError


class Boxes(NamedTuple):
    """Boxes of a picture."""

    corners: NDArray[np.float32]
    """(n, 4) as x1, y1, x2, y2 in pixels of the picture."""
    scores: NDArray[np.float64]
    """(n,), the detector's."""
    categories: NDArray[np.int64]
    """(n,), places among the sorted ids."""

    def within(self, height: int, width: int) -> "Boxes":
        """Clipped to a picture; what lies outside of it is left out."""
        corners = self.corners.clip(0, np.array([width, height, width, height], np.float32))
        kept = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        return Boxes(corners[kept], self.scores[kept], self.categories[kept])


NO_BOXES = Boxes(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int64))


def read_detections(
    path: Path, images: Collection[int | str], categories: Mapping[int | str, int]
) -> dict[int | str, Boxes]:
    """The boxes of each picture, by its id.

    Args:
        path: of the JSON: a list of `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
        images: ids that the annotation file has.
        categories: the place of each id that it has.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no such list; names the entry and the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"detections: there is no file {path}.")
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(listed, list):
        raise DataError(f"{path} is no list of detections in COCO's results format.")
    rows: dict[int | str, list[tuple[Any, ...]]] = {}
    for place, entry in enumerate(listed):
        try:
            image, row = _entry(entry, images, categories)
        except KeyError as error:
            raise DataError(f"{path}: detection [{place}] has no field {error}.") from error
        except ValueError as error:
            raise DataError(f"{path}: detection [{place}] {error}.") from error
        rows.setdefault(image, []).append(row)
    return {image: _joined(found) for image, found in rows.items()}


def _entry(
    entry: Any, images: Collection[int | str], categories: Mapping[int | str, int]
) -> tuple[int | str, tuple[Any, ...]]:
    if not isinstance(entry, dict):
        raise ValueError(f"is {shown(entry)}; an object with fields is needed")
    image, category = values.identifier(entry, "image_id"), values.identifier(entry, "category_id")
    if image not in images:
        raise ValueError(f"is of image {shown(image)}, which the annotation file does not have")
    if category not in categories:
        raise ValueError(f"has the category {shown(category)}, which the annotation file does not have")
    x, y, width, height = values.box(entry)
    try:
        score = values.number(entry["score"])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"has the score {shown(entry['score'])}; a finite number is needed")
    return image, (x, y, x + width, y + height, score, categories[category])


def _joined(rows: list[tuple[Any, ...]]) -> Boxes:
    table = np.array(rows, np.float64)
    return Boxes(table[:, :4].astype(np.float32), table[:, 4], table[:, 5].astype(np.int64))
