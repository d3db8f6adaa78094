"""Benchmarks are scripts, not a package: their folders come on the path while a test imports them."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by name, `cbq` of the effects or `speed_cbq`."""

    def module(name):
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.syspath_prepend(BENCHMARKS / "effects")
        return importlib.import_module(name)

    return module
