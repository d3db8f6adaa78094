"""Ranges, choices, and groups of options that are written once."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.parts.options import OptionError, check_choice, check_range, options_of


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.999), (-1e-9, 1)),
        ("(0, 1]", (1e-9, 1), (0, 1.001)),
        ("(0, 1)", (0.5,), (0, 1)),
        ("[0.9, 1]", (0.9, 1), (0.89, 1.1)),
        ("[1, inf)", (1, 10**9), (0, float("inf"))),
        ("(0, inf)", (1e-9,), (0, -1)),
    ],
)
def test_ranges(interval, inside, outside):
    for value in inside:
        check_range("share", value, interval)
    for value in (*outside, float("nan")):
        with pytest.raises(OptionError, match=f"^share={value}: it must be "):
            check_range("share", value, interval)


def test_what_is_expected_is_said():
    with pytest.raises(OptionError, match=r"^share=2: it must be in \[0, 1\)\.$"):
        check_range("share", 2, "[0, 1)")
    with pytest.raises(OptionError, match=r"^epochs=0: it must be at least 1\.$"):
        check_range("epochs", 0, "[1, inf)")
    with pytest.raises(OptionError, match=r"^damp=0: it must be above 0\.$"):
        check_range("damp", 0, "(0, inf)")
    with pytest.raises(OptionError, match=r"^mode=c: it must be one of a, b\.$"):
        check_choice("mode", "c", Literal["a", "b"])
    check_choice("mode", "b", Literal["a", "b"])


def test_the_error_is_one_of_the_users_and_a_value_error():
    assert issubclass(OptionError, MisconfigurationException)
    assert issubclass(OptionError, ValueError)


@dataclass(frozen=True)
class Grid:
    """A grid.

    Args:
        bits: of a number.
        symmetric: no zero point.
    """

    bits: int = 4
    symmetric: bool = False


class Quantizer:
    """A quantizer.

    Args:
        targets: which layers.
    """

    @options_of(Grid)
    def __init__(self, *, settings: Grid, targets: str = "*") -> None:
        self.grid, self.targets = settings, targets


class Learned(Quantizer):
    """A quantizer that learns.

    Args:
        epochs: passes.
        options: of `Quantizer`.
    """

    def __init__(self, *, epochs: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.epochs = epochs


def test_a_group_is_given_field_by_field():
    learned = Learned(epochs=2, bits=3, targets="a")
    assert (learned.grid, learned.targets, learned.epochs) == (Grid(3), "a", 2)
    assert list(inspect.signature(Quantizer.__init__).parameters) == ["self", "bits", "symmetric", "targets"]
    with pytest.raises(TypeError, match="bit"):
        Quantizer(bit=3)


def test_the_command_line_shows_the_fields(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Learned, "q")
    chosen = parser.parse_args(["--q.bits=3", "--q.epochs=5"]).q
    assert chosen.as_dict() == {"bits": 3, "symmetric": False, "targets": "*", "epochs": 5}
    shown = " ".join(parser.format_help().split())
    for sentence in ("of a number. (type: int, default: 4)", "which layers.", "passes. (type: int"):
        assert sentence in shown
