"""Fuzz tests of readers: any input is read, skipped and counted, or refused in one sentence; nothing else."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from featherlight_errors import sentence_of

_home = tempfile.TemporaryDirectory(prefix="hypothesis-")  # it would write `.hypothesis` into the checkout
set_hypothesis_home_dir(_home.name)


def fuzz(examples: int) -> settings:
    """The decorator of a bounded test: as many examples, the same ones in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Outcome:
    """What became of an input: `value` of what was read, or the `sentence` that refused it."""

    value: Any = None
    sentence: str | None = None

    @property
    def read(self) -> bool:
        return self.sentence is None


def outcome(function: Callable[[], Any], *names: str | Path) -> Outcome:
    """Call a reader; anything but a result or a sentence goes on as the exception that it is.

    What was skipped is in `value` or in the log: the test compares its count with what is missing.

    Args:
        function: reads one input.
        names: what a sentence has to name, such as the file.
    """
    try:
        return Outcome(value=function())
    except Exception as error:
        if sentence_of(error) is None:
            raise
        kind, sentence = type(error).__name__, str(error)
    assert sentence.strip(), f"{kind} says nothing"
    assert "\n" not in sentence, f"more than a sentence: {sentence!r}"
    assert "Traceback" not in sentence, sentence
    missing = [str(name) for name in names if str(name) not in sentence]
    assert not missing, f"{sentence!r} does not name {missing}"
    return Outcome(sentence=sentence)
