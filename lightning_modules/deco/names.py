"""What a detector and its data say to each other about classes: their number and their names."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def compare_class_counts(data: Any, num_classes: int, stage: str) -> None:
    """Make sure that a detector has an output for each label of the data.

    Raises:
        MisconfigurationException: the data has more classes; names both numbers.
    """
    try:
        found = getattr(data, "num_classes", None)
    except FileNotFoundError:
        if stage != "predict":  # on a folder, where the names of a checkpoint will do
            raise
        return
    if found is not None and found > num_classes:
        raise MisconfigurationException(
            f"The data's labels go up to {found - 1}, but model.network.init_args.num_classes is "
            f"{num_classes}."
        )


def remember_names(checkpoint: dict[str, Any], data: Any) -> None:
    """Put the data's class names into a checkpoint that is saved, if it has any."""
    names = getattr(data, "class_names", None)
    if names is not None:
        checkpoint["class_names"] = list(names)


def recall_names(checkpoint: dict[str, Any], data: Any) -> None:
    """Have the data number its labels as the checkpoint's names do, if both know of names."""
    names, use = checkpoint.get("class_names"), getattr(data, "use_class_names", None)
    if names is not None and use is not None:
        use(names)
