"""Options: ranges and choices are checked in one way, and a group of options is written once."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class OptionError(MisconfigurationException, ValueError):
    """An option has a value that it cannot have: names the option, the value and what is expected."""


def check(condition: bool, option: str, value: Any, expected: str) -> None:
    """Refuse a value of an option.

    Raises:
        OptionError: `condition` is false.
    """
    if not condition:
        raise OptionError(f"{option}={value}: it must be {expected}.")


def check_range(option: str, value: float, interval: str) -> None:
    """Refuse a number outside of an interval.

    Example:
        >>> check_range("target_sparsity", 0.9, "[0, 1)")

    Args:
        option: its name, as the user wrote it.
        value: of the option; not-a-number lies in no interval.
        interval: as mathematics writes it: `[0, 1)`, `(0, 1]`, `[1, inf)`.

    Raises:
        OptionError: the value is outside.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    expected = f"in {interval}"
    if high == float("inf"):
        expected = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
    check(above and below, option, value, expected)


def check_choice(option: str, value: str, choices: Any) -> None:
    """Refuse a value that is none of a `Literal`'s.

    Raises:
        OptionError: names the choices.
    """
    check(value in get_args(choices), option, value, "one of " + ", ".join(get_args(choices)))


def options_of(group: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate an `__init__` that takes a dataclass as `settings`: callers give its fields, one by one.

    Signature and docstring follow, so that the command line, YAML and `help` show every field with its type,
    default and description, which stand in the dataclass alone.

    Example:
        >>> class CBQ(Callback):
        ...     @options_of(CrossBlockSettings)
        ...     def __init__(self, *, settings: CrossBlockSettings, resume: bool = True) -> None: ...
        >>> CBQ(window=2, resume=False)

    Args:
        group: the dataclass; its docstring has a part `Args:`.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def with_options(self: Any, *args: Any, **options: Any) -> None:
            chosen = {field.name: options.pop(field.name) for field in fields(group) if field.name in options}
            init(self, *args, settings=group(**chosen), **options)

        signature = inspect.signature(init)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            expanded = inspect.signature(group).parameters.values() if parameter.name == "settings" else ()
            parameters += [option.replace(kind=parameter.kind) for option in expanded] or [parameter]
        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__doc__ = group.__doc__
        return with_options

    return decorate
