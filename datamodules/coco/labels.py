"""Labels of a COCO data set: they go by the names of the training file, whatever numbers another file has."""

from collections.abc import Iterable, Mapping, Sequence

from datamodules.coco.annotations import CocoAnnotations
from datamodules.coco.values import identifier, shown
from datamodules.reading import DataError

NO_CLASS = "no class"
"""Name of a label that no category has."""

_LARGEST = 100_000
"""Largest id that is a label: class names are a list, and ids made by hashing would fill the memory."""


def numbered_labels(
    annotations: CocoAnnotations, contiguous: bool, classes: Sequence[str] | None = None
) -> dict[str, int]:
    """The label of each category's name; categories of one name are one class.

    Args:
        annotations: of the training split.
        contiguous: labels are the places of the sorted ids, otherwise the ids themselves.
        classes: names of the only ones to use; None is all.

    Raises:
        DataError: there are no categories, `classes` are none or unknown, or an id cannot be a label.
    """
    names = _first_ids(annotations)
    if classes is not None and not classes:
        raise DataError(f"classes: [] leaves nothing to learn; {annotations.path} has {', '.join(names)}.")
    unknown = sorted(set(classes or ()) - set(names))
    if unknown:
        raise DataError(
            f"classes: {annotations.path} has no category {', '.join(unknown)}; it has {', '.join(names)}."
        )
    ids = {name: written for name, written in names.items() if classes is None or name in classes}
    if not ids:
        raise DataError(f"{annotations.path} has no categories, so there is nothing to learn from it.")
    if contiguous:
        return {name: label for label, name in enumerate(ids)}
    return {name: _label(annotations, name, written) for name, written in ids.items()}


def _first_ids(annotations: CocoAnnotations) -> dict[str, int | str]:
    """The smallest id of each name, in the order of the ids."""
    names: dict[str, int | str] = {}
    for entry in annotations.categories:
        names.setdefault(entry["name"], entry["id"])
    return names


def _label(annotations: CocoAnnotations, name: str, written: int | str) -> int:
    key = identifier({"id": written}, "id")
    if isinstance(key, int) and 0 <= key <= _LARGEST:
        return key
    raise DataError(
        f"{annotations.path}: the category {shown(name)} has the id {shown(written)}, which cannot be a "
        "label; set data.init_args.contiguous_labels: true, or name the classes to use in "
        "data.init_args.classes."
    )


def check_names(annotations: CocoAnnotations, labels: Iterable[str], source: str) -> None:
    """Make sure that each category of a file has a label.

    Raises:
        DataError: one has none; names file, category, and `source`, where the labels come from.
    """
    known = set(labels)
    unknown = [entry["name"] for entry in annotations.categories if entry["name"] not in known]
    if unknown:
        raise DataError(
            f"{annotations.path} has the category {', '.join(map(shown, unknown))}, which {source} lacks; "
            "to leave it out, name the classes to use in data.init_args.classes."
        )


def names_by_label(labels: Mapping[str, int]) -> list[str]:
    """The name of each label, `NO_CLASS` where there is none."""
    names = {label: name for name, label in labels.items()}
    return [names.get(label, NO_CLASS) for label in range(max(names) + 1)]


def ids_by_label(annotations: CocoAnnotations, labels: Mapping[str, int]) -> list[int | str]:
    """The id that a file has for each label, as it writes it; -1 where it has none."""
    names = _first_ids(annotations)
    return [names.get(name, -1) for name in names_by_label(labels)]
