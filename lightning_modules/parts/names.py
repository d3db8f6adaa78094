"""Class names travel with the weights: into a checkpoint, and from there to whoever writes predictions."""

import contextlib
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.parts.contracts import HasClassNames, HasNamedLabels, datamodule_of, offers, optional
from lightning_modules.parts.weights import examples


def names_of(data: Any) -> list[str] | None:
    """The class names of a data module or a module; None where it has none."""
    named = optional(data, HasClassNames)
    with contextlib.suppress(
        MisconfigurationException, FileNotFoundError
    ):  # how some say that they have none
        names = None if named is None else named.class_names
        return None if names is None else [str(name) for name in names]
    return None


def known_names(trainer: Any, module: Any) -> list[str] | None:
    """The class names of a run: its data module's, else those that a checkpoint brought to the module."""
    return names_of(datamodule_of(trainer)) or names_of(module)


def compare_names(saved: Sequence[str], data: Any) -> None:
    """Look whether the labels of the data mean what they meant in training.

    Raises:
        MisconfigurationException: the same names are in another order.
    """
    given = names_of(data)
    if given is None or given == list(saved) or offers(data, HasNamedLabels):
        return  # the last numbers its labels by the names of the checkpoint
    differing = [f"{ours} for {theirs}" for theirs, ours in zip(saved, given, strict=False) if theirs != ours]
    if sorted(given) == sorted(saved):
        raise MisconfigurationException(
            "The data numbers its classes in another order than the checkpoint's: "
            f"{examples(differing)}. Give it the same order as in training."
        )
    rank_zero_warn(
        f"The data has other class names than the checkpoint ({len(given)} and {len(saved)}: "
        f"{examples(differing)}): its labels are compared by number."
    )
