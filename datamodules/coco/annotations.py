"""A COCO annotation file as arrays on disk that all workers share.

A large JSON takes several times its size as Python objects, and every worker that only reads them copies
them, page by page, as reference counts change. So the file is parsed once, written as a few arrays beside
it, and from then on mapped into memory: processes share the pages, and only what is looked at is read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from datamodules.coco import values
from datamodules.coco.segmentation import short_parts
from datamodules.coco.values import shown
from datamodules.reading import DataError
from datamodules.samples.writing import atomic_folder

log = logging.getLogger(__name__)

Row = TypeVar("Row")

CAPTION = -1
"""Category of what has a caption and no box."""
IGNORED = -2
"""Category of what has the id -1, by which exporters mark regions that are of no class."""

_NO_CATEGORY = -1
_VERSION = 3
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
_FILES = ("images", "objects", "text")
_IMAGE = np.dtype(
    [
        ("id", "i8"),
        ("key", "i8", 2),
        ("height", "i4"),
        ("width", "i4"),
        ("first", "i8"),
        ("count", "i4"),
        ("name", "i8", 2),
    ]
)
_OBJECT = np.dtype(
    [
        ("entry", "i8"),
        ("category", "i4"),
        ("bbox", "f8", 4),
        ("area", "f8"),
        ("crowd", "?"),
        ("short", "i4"),
        ("text", "i8", 2),
    ]
)


class CocoAnnotations:
    """Images and annotations of a COCO JSON; images keep the order of the file, and so do those of an image.

    The arrays are made when they are not there yet, beside the JSON or, where that folder cannot be
    written, in the user's cache. They are made again when size or time of the JSON have changed, or when they
    cannot be read or are damaged. What is pickled (for a worker) is the path alone.

    Args:
        path: of the JSON.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no COCO file; names the file and what is wrong in it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no annotation file {path}.")
        self.path = path
        self._open(checked=True)

    def _open(self, checked: bool) -> None:
        meta, arrays = _index(self.path, checked)
        self.categories: list[dict[str, Any]] = meta["categories"]
        """`id`, as the file writes it, and `name` of each category, by id; one with the id -1 is none."""
        self.numbered: bool = meta["numbered"]
        """Whether the images' ids are numbers; otherwise `images["id"]` are positions in the file."""
        self.climbing: list[int] = meta["climbing"]
        """Images whose file name is absolute or has a part `..`."""
        self.images, self.objects, self._text = arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open(checked=False)  # who has made this worker has checked

    def __len__(self) -> int:
        return len(self.images)

    @property
    def category_ids(self) -> list[int | str]:
        """Ids of the categories, ascending, as the file writes them."""
        return [category["id"] for category in self.categories]

    def file_name(self, index: int) -> str:
        """Of an image."""
        return self._read(self.images[index]["name"]).decode("utf-8", "surrogatepass")

    def image_id(self, index: int) -> int | str:
        """Of an image, as the file writes it."""
        written = self._read(self.images[index]["key"])
        return json.loads(written) if written else int(self.images[index]["id"])

    def image_key(self, index: int) -> int | str:
        """The id of an image as it compares with those of another file on the same images."""
        if self.numbered:
            return int(self.images[index]["id"])
        return values.identifier({"id": self.image_id(index)}, "id")

    def of(self, index: int) -> NDArray[Any]:
        """Annotations of an image, structured: `entry`, the place in the file, `category`, the place in
        `categories`, `CAPTION` or `IGNORED`, `bbox` (x, y, w, h), `area`, `crowd`, and `short`, see
        `short_parts`.
        """
        image = self.images[index]
        return self.objects[image["first"] : image["first"] + image["count"]]

    def segmentation(self, annotation: Any) -> Any:
        """What the JSON says of an annotation's shape: polygons, run lengths, or None."""
        text = self._read(annotation["text"])
        return json.loads(text) if text else None

    def caption(self, annotation: Any) -> str:
        """Of an annotation of the category `CAPTION`."""
        return self._read(annotation["text"]).decode("utf-8", "surrogatepass")

    def _read(self, place: Sequence[int]) -> bytes:
        return self._text[place[0] : place[1]].tobytes()


# The arrays on disk


def _index(path: Path, checked: bool) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """What the arrays of a JSON hold, made if need be.

    Args:
        path: of the JSON.
        checked: compare images and annotations with their digest.
    """
    status = path.stat()
    name = f"{path.stem}-{status.st_size}-{status.st_mtime_ns}-{_VERSION}"
    digest = hashlib.sha1(str(path.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    candidates = [path.parent / ".index" / name, _user_cache() / digest / name]
    for folder in candidates:
        if (folder / "meta.json").is_file():
            try:
                return _load(folder, checked)
            except (OSError, ValueError, TypeError, EOFError) as error:
                log.warning("%s cannot be read and is made again (%s).", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
    content = _parse(path)
    for folder in candidates:
        try:
            with atomic_folder(folder) as target:
                _save(target, *content)
            return _load(folder, checked=False)
        except (OSError, ValueError) as error:
            refused = error
    raise DataError(
        f"The index of {path} can be written neither beside it nor to {candidates[1].parent}: {refused}."
    )


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "featherlight" / "coco"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "featherlight" / "coco"


def _save(
    folder: Path, meta: dict[str, Any], images: NDArray[Any], objects: NDArray[Any], text: bytes
) -> None:
    for name, array in zip(_FILES, (images, objects, np.frombuffer(text or b"\0", np.uint8)), strict=True):
        np.save(folder / f"{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps({**meta, "digest": _digest(images, objects)}))


def _digest(images: NDArray[Any], objects: NDArray[Any]) -> str:
    """Of the fixed part; the texts are large, and damage in them shows when they are read."""
    summed = hashlib.blake2b(digest_size=16)
    for array in (images, objects):
        summed.update(array.view(np.uint8).data)
    return summed.hexdigest()


def _load(folder: Path, checked: bool) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    meta = json.loads((folder / "meta.json").read_text())
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES]
    kinds = [array.dtype for array in arrays]
    known = {"categories", "numbered", "climbing", "digest"} <= set(meta)
    if kinds != [_IMAGE, _OBJECT, np.dtype(np.uint8)] or not known:
        raise ValueError("it holds something else")
    if checked and _digest(*arrays[:2]) != meta["digest"]:
        raise ValueError("it is damaged")
    return meta, arrays


# The JSON


def _parse(path: Path) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], bytes]:
    """Meta data, images, annotations and texts of a JSON."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path} is no COCO annotation file: it has no list 'images'.")
    entries = {name: content.get(name) or [] for name in ("images", "annotations", "categories")}
    for name, listed in entries.items():
        if not isinstance(listed, list):
            raise DataError(f"{path}: '{name}' is {shown(listed)}; a list is needed.")
    text = _Texts()
    categories, rows = _categories(path, entries["categories"])
    images, owners, meta = _images(path, entries["images"], text)
    objects, counts = _objects(path, entries["annotations"], owners, rows, text)
    images["count"] = counts
    images["first"] = np.cumsum(counts) - counts
    return {"categories": categories, **meta}, images, objects, text.joined()


def _each(
    path: Path,
    kind: str,
    listed: list[Any],
    read: Callable[[dict[str, Any]], Row],
    order: Iterable[int] | None = None,
) -> Iterator[Row]:
    """What is read of each entry of a list; what is wrong with one is an error that names it."""
    for place in range(len(listed)) if order is None else order:
        entry = listed[place]
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"is {shown(entry)}; an object with fields is needed")
            yield read(entry)
        except KeyError as error:
            raise DataError(f"{path}: {_called(kind, place, entry)} has no field {error}.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {_called(kind, place, entry)} {error}.") from error


def _called(kind: str, place: int, entry: Any) -> str:
    """`annotation 5 (annotations[0])`."""
    known = entry.get("id") if isinstance(entry, dict) else None
    return f"{kind}[{place}]" if known is None else f"{_SINGULAR[kind]} {shown(known)} ({kind}[{place}])"


def _categories(path: Path, listed: list[Any]) -> tuple[list[dict[str, Any]], dict[int | str, int]]:
    """The categories by id, and the row of each id; that of -1 is `IGNORED`.

    Raises:
        DataError: one id has two names.
    """

    def read(entry: dict[str, Any]) -> tuple[int | str, dict[str, Any]]:
        key, name = values.identifier(entry, "id"), values.text(entry, "name")
        if names.setdefault(key, name) != name:
            raise ValueError(f"is called {shown(name)}, but that id is {shown(names[key])}'s already")
        return key, {"id": _written(entry["id"], key), "name": name}

    names: dict[int | str, str] = {}
    found = dict(_each(path, "categories", listed, read))
    ignored = {_NO_CATEGORY: IGNORED} if found.pop(_NO_CATEGORY, None) else {}
    ordered = sorted(found, key=lambda key: (isinstance(key, str), key))
    return [found[key] for key in ordered], {key: row for row, key in enumerate(ordered)} | ignored


def _written(value: Any, key: int | str) -> int | str:
    """An id as results have to repeat it: a text stays one."""
    return value if isinstance(value, str) else key


def _images(
    path: Path, listed: list[Any], text: "_Texts"
) -> tuple[NDArray[Any], dict[int | str, int], dict[str, Any]]:
    """The images, the row of each id, and what the meta data say of them."""

    def read(entry: dict[str, Any]) -> tuple[int | str, str, int, int, bytes]:
        key = values.identifier(entry, "id")
        size = values.extent(entry, "height"), values.extent(entry, "width")
        written = json.dumps(_written(entry["id"], key)).encode()
        return key, _file_name(entry), *size, written

    found = list(_each(path, "images", listed, read))
    rows: dict[int | str, int] = {}
    for row, (key, *_) in enumerate(found):
        if rows.setdefault(key, row) != row:
            raise DataError(
                f"{path}: two images have one id, {shown(key)} (images[{rows[key]}] and images[{row}])."
            )
    numbered = all(isinstance(key, int) and -(2**63) <= key < 2**63 for key in rows)
    images = np.zeros(len(found), _IMAGE)
    for row, (key, name, height, width, written) in enumerate(found):
        plain = numbered and written == str(key).encode()
        images[row] = (
            key if numbered else row,
            (0, 0) if plain else text.add(written),
            *(height, width, 0, 0),
            text.add(name.encode("utf-8", "surrogatepass")),
        )
    climbing = [row for row, (_, name, *_) in enumerate(found) if _climbs(name)]
    return images, rows, {"numbered": numbered, "climbing": climbing}


def _climbs(name: str) -> bool:
    """Whether a file name is absolute or has a part `..`, with either system's separators."""
    parts = re.split(r"[/\\]", name)
    return not parts[0] or ".." in parts


def _file_name(entry: dict[str, Any]) -> str:
    """Relative to the folder of the images; LVIS has none, but the address of COCO's image."""
    if entry.get("file_name") is None and isinstance(entry.get("coco_url"), str):
        return "/".join(entry["coco_url"].split("/")[-2:])
    return values.text(entry, "file_name")


def _objects(
    path: Path, listed: list[Any], owners: dict[int | str, int], rows: dict[int | str, int], text: "_Texts"
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The annotations in the order of their images, and how many each image has."""

    def owner(entry: dict[str, Any]) -> int:
        key = values.identifier(entry, "image_id")
        if key not in owners:
            raise ValueError(f"is of image {shown(entry['image_id'])}, which is not in the file")
        return owners[key]

    def instance(entry: dict[str, Any]) -> tuple[Any, ...]:
        if entry.get("bbox") is None and "category_id" not in entry and isinstance(entry.get("caption"), str):
            words = entry["caption"].encode("utf-8", "surrogatepass")
            return CAPTION, (0, 0, 0, 0), 0, False, 0, text.add(words)
        box = values.box(entry)
        category = values.identifier(entry, "category_id")
        if category not in rows:
            raise ValueError(f"has the category {shown(entry['category_id'])}, which is not in the file")
        shape = entry.get("segmentation")
        stored = text.add(json.dumps(shape, separators=(",", ":")).encode() if shape else b"")
        size = values.area(entry, box[2] * box[3])
        return rows[category], box, size, values.crowd(entry), short_parts(shape), stored

    places = np.fromiter(_each(path, "annotations", listed, owner), np.int64)
    order = np.argsort(places, kind="stable").tolist()
    objects = np.zeros(len(listed), _OBJECT)
    found = _each(path, "annotations", listed, instance, order)
    for row, (entry, fields) in enumerate(zip(order, found, strict=True)):
        objects[row] = (entry, *fields)
    return objects, np.bincount(places, minlength=len(owners))


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
