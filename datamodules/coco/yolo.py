"""YOLO's labels, a text file for each picture, as the annotation file that the rest reads."""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules.coco.module import CocoDataModule
from datamodules.reading import CorruptSampleError, DataError, list_images

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112


class YoloDataModule(CocoDataModule):
    """Detection data in YOLO's layout, see `CocoDataModule`.

    ``images/<split>/a.jpg`` has its objects in ``labels/<split>/a.txt``, a line each: the class's number and
    centre, width and height, or a polygon, as fractions of the upright picture. A picture without a file has
    no objects. ``data.yaml`` (or another YAML file in ``root``) has the classes' ``names``.

    It is written as ``annotations/yolo_<split>.json`` into ``root``, again whenever a label or a folder is
    newer.

    Args:
        train_split: name of the training split.
        val_split: of the validation split.
        options: of `CocoDataModule`.
    """

    layout: ClassVar[str] = "images/{train,val}/*.jpg, labels/{train,val}/*.txt, and data.yaml with names"

    def __init__(self, *, train_split: str = "train", val_split: str = "val", **options: Any) -> None:
        if options.get("sample") or options.get("download"):
            raise MisconfigurationException(
                "YoloDataModule has no sample and no download: set both to false."
            )
        own = {"images": "images/{split}", "instances": "annotations/yolo_{split}.json"}
        super().__init__(
            train_split=train_split,
            val_split=val_split,
            **{"contiguous_labels": True, **own, **options},
        )

    def prepare_data(self) -> None:
        """Writes the annotation files that are missing or older than the labels."""
        for name in sorted(set(self.splits.values())):
            pictures, labels = self.root / self.images.format(split=name), self.root / "labels" / name
            target = self.root / self.instances.format(split=name)
            if pictures.is_dir() and not _is_newer(target, pictures, labels):
                content = converted(pictures, labels, class_names(self.root))
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
                unfinished.write_text(json.dumps(content), encoding="utf-8")
                os.replace(unfinished, target)
        super().prepare_data()


def _is_newer(target: Path, pictures: Path, labels: Path) -> bool:
    if not target.is_file():
        return False
    others = [pictures, *pictures.rglob("*"), labels, *labels.rglob("*"), *_yamls(pictures.parents[1])]
    return all(target.stat().st_mtime > path.stat().st_mtime for path in others if path.exists())


def _yamls(root: Path) -> list[Path]:
    """The YAML files in a folder, `data.yaml` first."""
    return sorted(
        (*root.glob("*.yaml"), *root.glob("*.yml")), key=lambda path: (path.stem != "data", path.name)
    )


def class_names(root: Path) -> list[str]:
    """The names of the classes in the order of their numbers.

    Raises:
        DataError: no YAML file in `root` has `names`, or they are no list or numbered mapping.
    """
    for path in _yamls(root):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(content, dict) or "names" not in content:
            continue
        names = content["names"]
        if isinstance(names, dict) and set(names) == set(range(len(names))):
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
            raise DataError(f"{path}: names must be a list, or a mapping of 0, 1, ..., each name once.")
        return [str(name) for name in names]
    raise DataError(f"{root} has no YAML file with the `names` of the classes (data.yaml).")


def converted(pictures: Path, labels: Path, names: list[str]) -> dict[str, Any]:
    """The content of a COCO annotation file for a folder of pictures with YOLO labels.

    Raises:
        DataError: there is no picture, or a line of a label file is wrong; names file and line.
        CorruptSampleError: a picture's size cannot be read.
    """
    listing = list_images(pictures)
    if not listing.names:
        raise DataError(f"{pictures} has no images{listing.left_out()}.")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, name in enumerate(listing.names, start=1):
        width, height = _upright_size(pictures / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        file = labels / Path(name).with_suffix(".txt")
        for label, box, polygon in _objects(file, len(names)) if file.is_file() else ():
            x, y, w, h = (side * size for side, size in zip(box, (width, height) * 2, strict=True))
            entry: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": label,
                "iscrowd": 0,
            }
            shape = [side * (width, height)[place % 2] for place, side in enumerate(polygon)]
            entry |= {"segmentation": [shape]} if shape else {}
            annotations.append({**entry, "bbox": [x, y, w, h], "area": w * h})
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _objects(
    file: Path, classes: int
) -> Iterator[tuple[int, tuple[float, float, float, float], list[float]]]:
    """Label, box (x, y, width, height) and polygon of each line, in fractions of the picture."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise DataError(f"{file}, line {number}: expected numbers, got '{line[:80]}'.") from None
        if not 0 <= label < classes:
            raise DataError(f"{file}, line {number}: class {label}, but data.yaml names {classes}.")
        is_polygon = len(values) >= 6 and len(values) % 2 == 0
        if len(values) != 4 and not is_polygon:
            raise DataError(
                f"{file}, line {number}: expected centre, width and height, or the points of a polygon, "
                f"after the class, got {len(values)} numbers."
            )
        if not all(-0.01 <= value <= 1.01 for value in values):
            raise DataError(f"{file}, line {number}: expected fractions of the picture, between 0 and 1.")
        if is_polygon:
            xs, ys = values[::2], values[1::2]
            yield label, (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), values
        else:
            x, y, width, height = values
            yield label, (x - width / 2, y - height / 2, width, height), []


def _upright_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return (image.height, image.width) if turned else image.size
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise CorruptSampleError(f"cannot read the image {path} ({' '.join(str(error).split())})") from error
