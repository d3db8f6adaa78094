"""What a detector and its data say to each other about classes: their number and their names."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.parts.contracts import HasNamedLabels, HasNumClasses, optional


def compare_class_counts(data: Any, num_classes: int, stage: str) -> None:
    """Make sure that a detector has an output for each label of the data.

    Raises:
        MisconfigurationException: the data has more classes; names both numbers.
    """
    described = optional(data, HasNumClasses)
    try:
        found = None if described is None else described.num_classes
    except FileNotFoundError:
        if stage != "predict":  # on a folder, where the names of a checkpoint will do
            raise
        return
    if found is not None and found > num_classes:
        raise MisconfigurationException(
            f"The data's labels go up to {found - 1}, but model.network.init_args.num_classes is "
            f"{num_classes}."
        )


def recall_names(checkpoint: dict[str, Any], data: Any) -> None:
    """Have the data number its labels as the checkpoint's names do, if both know of names."""
    names, numbered = checkpoint.get("class_names"), optional(data, HasNamedLabels)
    if names is not None and numbered is not None:
        numbered.use_class_names(names)
