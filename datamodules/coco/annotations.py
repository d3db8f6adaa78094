"""A COCO annotation file as arrays on disk that all workers share.

A large JSON takes several times its size as Python objects, and every worker that only reads them copies
them, page by page, as reference counts change. So the file is parsed once, written as a few arrays beside
it, and from then on mapped into memory: processes share the pages, and only what is looked at is read.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.samples.writing import atomic_folder

_VERSION = 1
_IMAGE = np.dtype(
    [("id", "i8"), ("height", "i4"), ("width", "i4"), ("first", "i8"), ("count", "i4"), ("name", "i8", 2)]
)
_OBJECT = np.dtype(
    [("id", "i8"), ("category", "i8"), ("bbox", "f8", 4), ("area", "f8"), ("crowd", "?"), ("text", "i8", 2)]
)


class CocoAnnotations:
    """Images and annotations of a COCO JSON; images keep the order of the file, and so do those of an image.

    The arrays are made when they are not there yet, beside the JSON or, where that folder cannot be
    written, in the user's cache. They are made again when size or time of the JSON have changed. What is
    pickled (for a worker) is the path alone.

    Args:
        path: of the JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no COCO file; names the file and what is wrong in it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no annotation file {path}.")
        self.path = path
        self._open()

    def _open(self) -> None:
        folder = _index_folder(self.path)
        meta = json.loads((folder / "meta.json").read_text())
        self.categories: list[dict[str, Any]] = meta["categories"]
        """`id` and `name` of each category, by id."""
        self.images: NDArray[Any] = np.load(folder / "images.npy", mmap_mode="r")
        self.objects: NDArray[Any] = np.load(folder / "objects.npy", mmap_mode="r")
        self._text: NDArray[np.uint8] = np.load(folder / "text.npy", mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def category_ids(self) -> list[int]:
        """Ids of the categories, ascending."""
        return [category["id"] for category in self.categories]

    def file_name(self, index: int) -> str:
        """Of an image."""
        return self._read(self.images[index]["name"]).decode()

    def of(self, index: int) -> NDArray[Any]:
        """Annotations of an image, structured: `id`, `category`, `bbox` (x, y, w, h), `area`, `crowd`."""
        image = self.images[index]
        return self.objects[image["first"] : image["first"] + image["count"]]

    def segmentation(self, annotation: Any) -> Any:
        """What the JSON says of an annotation's shape: polygons, run lengths, or None."""
        text = self._read(annotation["text"])
        return json.loads(text) if text else None

    def caption(self, annotation: Any) -> str:
        """Of an annotation of a captions file."""
        return self._read(annotation["text"]).decode()

    def _read(self, place: Sequence[int]) -> bytes:
        return self._text[place[0] : place[1]].tobytes()


def _index_folder(path: Path) -> Path:
    """The arrays of a JSON, made if need be."""
    status = path.stat()
    name = f"{path.stem}-{status.st_size}-{status.st_mtime_ns}-{_VERSION}"
    beside = path.parent / ".index" / name
    digest = hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:12]
    candidates = [beside, _user_cache() / digest / name]
    for folder in candidates:
        if (folder / "meta.json").is_file():
            return folder
    arrays = _parse(path)
    for folder in candidates:
        try:
            with atomic_folder(folder) as target:
                _save(target, *arrays)
            return folder
        except OSError as error:
            refused = error
    raise OSError(
        f"The index of {path} can be written neither beside it nor to {candidates[1].parent}: {refused}."
    )


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "featherlight" / "coco"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "featherlight" / "coco"


def _save(
    folder: Path, categories: list[dict[str, Any]], images: NDArray[Any], objects: NDArray[Any], text: bytes
) -> None:
    np.save(folder / "images.npy", images)
    np.save(folder / "objects.npy", objects)
    np.save(folder / "text.npy", np.frombuffer(text or b"\0", np.uint8))
    (folder / "meta.json").write_text(json.dumps({"categories": categories}))


def _parse(path: Path) -> tuple[list[dict[str, Any]], NDArray[Any], NDArray[Any], bytes]:
    """Categories, images, annotations and texts of a JSON."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(f"{path} is no COCO annotation file: it has no list 'images'.")
    try:
        return _arrays(path, content)
    except KeyError as error:
        raise ValueError(f"{path}: an image, annotation or category has no field {error}.") from error


def _arrays(
    path: Path, content: dict[str, Any]
) -> tuple[list[dict[str, Any]], NDArray[Any], NDArray[Any], bytes]:
    """What `_parse` gives, of a file's content; a field that is not there is a KeyError."""
    categories: list[dict[str, Any]] = [
        {"id": int(entry["id"]), "name": str(entry["name"])} for entry in content.get("categories", [])
    ]
    categories.sort(key=lambda entry: entry["id"])
    listed = content["images"]
    place = {entry["id"]: number for number, entry in enumerate(listed)}
    if len(place) != len(listed):
        raise ValueError(f"{path}: two images have one id.")
    owners = [_owner(path, entry, place) for entry in content.get("annotations", [])]
    order = np.argsort(np.asarray(owners, np.int64), kind="stable")
    known = {entry["id"] for entry in categories}
    text = _Texts()
    objects = np.zeros(len(order), _OBJECT)
    for row, source in enumerate(order.tolist()):
        objects[row] = _object(path, content["annotations"][source], known, text)
    counts = np.bincount(np.asarray(owners, np.int64), minlength=len(listed))
    images = np.zeros(len(listed), _IMAGE)
    for row, entry in enumerate(listed):
        size = (entry.get("height", 0), entry.get("width", 0))
        images[row] = (entry["id"], *size, 0, counts[row], text.add(entry["file_name"].encode()))
    images["first"] = np.cumsum(counts) - counts
    return categories, images, objects, text.joined()


class _Texts:
    """Byte strings end to end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, part: bytes) -> tuple[int, int]:
        """Where the part begins and ends."""
        self._parts.append(part)
        self._length += len(part)
        return self._length - len(part), self._length

    def joined(self) -> bytes:
        return b"".join(self._parts)


def _owner(path: Path, entry: dict[str, Any], place: dict[int, int]) -> int:
    if entry.get("image_id") not in place:
        raise ValueError(
            f"{path}: annotation {entry.get('id')} is of image "
            f"{entry.get('image_id')}, which is not in the file."
        )
    return place[entry["image_id"]]


def _object(path: Path, entry: dict[str, Any], categories: Iterable[int], text: _Texts) -> tuple[Any, ...]:
    """One row of `_OBJECT`, from an instance or a caption."""
    if "caption" in entry:
        return entry["id"], 0, (0, 0, 0, 0), 0, False, text.add(entry["caption"].encode())
    box = [float(value) for value in entry["bbox"]]
    if len(box) != 4 or not np.isfinite(box).all() or box[2] < 0 or box[3] < 0:
        raise ValueError(
            f"{path}: annotation {entry['id']} has the bbox {entry['bbox']}; four finite numbers x, "
            "y, width, height are needed, and no negative width or height."
        )
    if entry["category_id"] not in categories:
        raise ValueError(
            f"{path}: annotation {entry['id']} has the category "
            f"{entry['category_id']}, which is not in the file."
        )
    shape = entry.get("segmentation")
    stored = text.add(json.dumps(shape, separators=(",", ":")).encode() if shape else b"")
    area = float(entry.get("area", box[2] * box[3]))
    return entry["id"], entry["category_id"], tuple(box), area, bool(entry.get("iscrowd", 0)), stored
