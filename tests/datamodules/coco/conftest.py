"""A small data set in COCO's layout that a test can make any way it wants."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.coco.module import CocoDataModule
from datamodules.coco.transforms import DecoTransforms

COLOURS = {"car": (250, 0, 0), "person": (0, 250, 0), "dog": (0, 0, 250)}
BOXES = {"car": [4, 6, 20, 16], "person": [30, 8, 24, 30], "dog": [8, 28, 18, 14]}


def content(ids: dict[Any, str], names: list[list[str]] | None = None) -> dict[str, Any]:
    """The JSON of pictures of 64 x 48 that show the named things, each at its place of `BOXES`.

    Args:
        ids: names by category id.
        names: what each picture shows; all of `BOXES` in two pictures by default.
    """
    names = [["car", "person"], ["dog", "person"]] if names is None else names
    back = {name: key for key, name in ids.items()}
    return {
        "images": [
            {"id": 10 + row, "file_name": f"{row}.png", "width": 64, "height": 48}
            for row in range(len(names))
        ],
        "annotations": [
            {
                "id": 100 * row + place + 1,
                "image_id": 10 + row,
                "category_id": back[name],
                "bbox": BOXES[name],
                "area": BOXES[name][2] * BOXES[name][3],
                "iscrowd": 0,
            }
            for row, shown in enumerate(names)
            for place, name in enumerate(shown)
        ],
        "categories": [{"id": key, "name": name} for key, name in ids.items()],
    }


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Write a split into `tmp_path / "coco"`: its JSON and, unless told otherwise, its pictures."""

    def write(split: str, instances: Any, kind: str = "instances", pictures: bool = True) -> Path:
        root = tmp_path / "coco"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        path = root / "annotations" / f"{kind}_{split}2017.json"
        path.write_text(json.dumps(instances))
        for row, image in enumerate(instances["images"] if pictures else ()):
            target = root / f"{split}2017" / image["file_name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(instances, row).save(target)
        return path

    return write


def draw(instances: dict[str, Any], row: int) -> Image.Image:
    """The picture of a row of `content`."""
    picture = Image.new("RGB", (64, 48), (60, 60, 60))
    names = {entry["id"]: entry["name"] for entry in instances["categories"]}
    for entry in instances["annotations"]:
        name = names.get(entry.get("category_id"))
        if entry.get("image_id") == instances["images"][row]["id"] and name in BOXES:
            x, y, w, h = BOXES[name]
            picture.paste(COLOURS[name], (x, y, x + w, y + h))
    return picture


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., CocoDataModule]:
    """A data module over what `made` has written."""

    def module(**options: Any) -> CocoDataModule:
        recipe = DecoTransforms(short_side=48, max_size=64, augmentation=False)
        defaults = {"root": tmp_path / "coco", "transforms": recipe, "batch_size": 2, "num_workers": 0}
        return CocoDataModule(**{**defaults, **options})

    return module
