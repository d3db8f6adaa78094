"""Annotations of the five data sets: one JSON list each, a record an image."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datamodules.reading import DataError

Name = Literal["cuhk_pedes", "icfg_pedes", "rstpreid", "ufine6926", "ufine3c"]
SPLITS = ("train", "val", "test")


class Layout(NamedTuple):
    """Where a data set has what.

    Args:
        annotations: names that the file may have.
        images: folder that image paths are relative to.
        path_key: of a record.
        counts: identities, images and captions of a split as published.
    """

    annotations: tuple[str, ...]
    images: str
    path_key: str
    counts: dict[str, tuple[int, int, int]]


LAYOUTS: dict[str, Layout] = {
    "cuhk_pedes": Layout(
        ("reid_raw.json",),
        "imgs",
        "file_path",
        {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)},
    ),
    "icfg_pedes": Layout(
        ("ICFG-PEDES.json", "ICFG_PEDES.json"),
        "imgs",
        "file_path",
        {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)},
    ),
    "rstpreid": Layout(
        ("data_captions.json",),
        "imgs",
        "img_path",
        {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)},
    ),
    "ufine6926": Layout(("UFine6926_Annotations.json",), "", "file_path", {}),
    "ufine3c": Layout(("UFine3C_Annotations.json",), "", "file_path", {"test": (2250, 7446, 37939)}),
}


class Person(NamedTuple):
    """A record: path of the image relative to the root, identity, captions."""

    path: str
    identity: int
    captions: tuple[str, ...]


def read_annotations(root: Path, name: str) -> dict[str, list[Person]]:
    """Records of every split.

    Raises:
        FileNotFoundError: there is no annotation file; names those that are expected.
        DataError: a record is not as it should be; names file and record number (from 0).
    """
    layout = LAYOUTS[name]
    file = next((root / each for each in layout.annotations if (root / each).is_file()), None)
    if file is None:
        expected = " or ".join(str(root / each) for each in layout.annotations)
        raise FileNotFoundError(f"dataset: {name}: there is no annotation file {expected}.")
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}).") from error
    if not isinstance(records, list):
        raise DataError(f"{file} holds a {type(records).__name__}, expected a list with a record an image.")
    found: dict[str, list[Person]] = {split: [] for split in SPLITS}
    seen: dict[str, int] = {}
    for number, record in enumerate(records):
        split, person = _person(record, f"{file}, record {number}", layout)
        if person.path in seen:
            raise DataError(
                f"{file}, record {number}: the image {person.path} is listed already in record "
                f"{seen[person.path]}; expected one record an image, with all its captions."
            )
        seen[person.path] = number
        found[split].append(person)
    return found


def _person(record: Any, where: str, layout: Layout) -> tuple[str, Person]:
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}, expected an object.")
    for key in ("split", "id", "captions", layout.path_key):
        if key not in record:
            raise DataError(f"{where} has no '{key}'.")
    split, identity, path = record["split"], record["id"], record[layout.path_key]
    if split not in SPLITS:
        raise DataError(f"{where}: split is {split!r}, expected one of {', '.join(SPLITS)}.")
    if not isinstance(identity, int) or isinstance(identity, bool):
        raise DataError(f"{where}: id is {identity!r}, expected an integer.")
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where}: {layout.path_key} is {path!r}, expected the path of the image.")
    captions = record["captions"]
    if not isinstance(captions, list) or not captions:
        raise DataError(f"{where}: the image {path} has no list of captions.")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{where}: a caption of the image {path} is {caption!r}, expected a sentence.")
    return split, Person(str(Path(layout.images) / path), identity, tuple(captions))


def refuse_overlap(split: str, persons: Iterable[Person], train: Iterable[Person], file: Path) -> None:
    """Refuse identities that are evaluated and trained on.

    Raises:
        DataError: counts them.
    """
    both = {person.identity for person in persons} & {person.identity for person in train}
    if both:
        raise DataError(
            f"{file}: {len(both)} identities of the {split} split are trained on too, such as {min(both)}; "
            "expected none, or set allow_overlap: true."
        )


def refuse_missing(root: Path, persons: Iterable[Person]) -> None:
    """Refuse records whose image does not exist.

    Raises:
        DataError: counts them and names the first three.
    """
    missing = [person.path for person in persons if not (root / person.path).is_file()]
    if missing:
        raise DataError(
            f"{root}: {len(missing)} images of the annotations are missing, such as {', '.join(missing[:3])}."
        )


def numbers(persons: Iterable[Person]) -> tuple[int, int, int]:
    """Identities, images and captions."""
    persons = list(persons)
    identities = Counter(person.identity for person in persons)
    return len(identities), len(persons), sum(len(person.captions) for person in persons)
