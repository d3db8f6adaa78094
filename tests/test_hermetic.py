"""The suite writes into temporary folders alone, and says so when it does not."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule

import datamodules
from tests.hermetic import snapshot

DATA_MODULES = [
    value
    for name in datamodules.__all__
    if isinstance(value := getattr(datamodules, name), type) and issubclass(value, LightningDataModule)
]


@pytest.mark.parametrize("kind", DATA_MODULES, ids=lambda kind: kind.__name__)
def test_a_root_by_position_is_refused(kind, tmp_path):
    """It would be taken for another option, and the data would be written into the default folder."""
    with pytest.raises(TypeError, match="positional argument"):
        kind(tmp_path)
    parameters = inspect.signature(kind.__init__).parameters.values()
    assert not [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


def test_a_snapshot_sees_outputs_change_and_leaves_tools_out(tmp_path):
    for path in ("data/old", "tests/test_x.py", ".venv/bin/python", "a/__pycache__/x.pyc", "x.egg-info/top"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    before = snapshot(tmp_path)
    assert set(before) == {"data", "data/old", "tests", "tests/test_x.py", "a"}
    os.utime(tmp_path / "tests/test_x.py", ns=(1, 1))  # edited while the tests run
    (tmp_path / ".venv/bin/python").unlink()
    assert snapshot(tmp_path) == before
    os.utime(tmp_path / "data/old", ns=(1, 1))
    assert snapshot(tmp_path) != before


@pytest.mark.parametrize(("root", "workers"), [("data", "2"), ("temporary", "0")])
def test_a_session_that_writes_into_the_checkout_fails(tmp_path, workers, root):
    checkout, repository = tmp_path / "checkout", Path(__file__).parent.parent
    (checkout / "data").mkdir(parents=True)
    (checkout / "data" / "from_a_quick_start").write_text("")
    (checkout / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        "from tests.hermetic import CheckoutGuard\n"
        "def pytest_configure(config):\n"
        "    if not hasattr(config, 'workerinput'):\n"
        "        config.pluginmanager.register(CheckoutGuard(config.rootpath))\n"
    )
    where = "Path('data')" if root == "data" else "tmp_path"
    (checkout / "test_it.py").write_text(
        f"from pathlib import Path\ndef test_it(tmp_path):\n    ({where} / 'new').touch()\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ".",
        "-n",
        workers,
    ]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (root == "data")
    assert ("FAILED: data/new." in done.stdout) == (root == "data")
