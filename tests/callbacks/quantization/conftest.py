"""The golden numbers and how their inputs are made."""

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDEN / "cbq.json").read_text())


@pytest.fixture(scope="session")
def inputs():
    """`inputs(label, shape)`, float64."""
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda label, shape: module.inputs(label, tuple(shape)).double()
