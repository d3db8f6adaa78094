"""Golden numbers of DECO: the recorded cases, and how a tensor is compared with a record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "golden" / "deco.json"


@pytest.fixture(scope="session")
def golden():
    """The recorded cases by name."""
    return json.loads(GOLDEN.read_text())["cases"]


@pytest.fixture(scope="session")
def agrees():
    """Compares a tensor with its record; a failure says where."""

    def check(tensor: torch.Tensor, record: dict, rtol: float = 1e-4, atol: float = 1e-4) -> None:
        values = tensor.detach().double().flatten().numpy()
        assert list(tensor.shape) == record["shape"]
        np.testing.assert_allclose(values[:8], record["first8"], rtol=rtol, atol=atol)
        np.testing.assert_allclose(values[record["idx"]], record["at"], rtol=rtol, atol=atol)
        found = (values.mean(), values.std(), np.abs(values).sum())
        expected = (record["mean"], record["std"], record["abs_sum"])
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)

    return check
