"""A pytest plug-in that fails a session in which something was written into the checkout.

A test that writes there passes once: where a quick start or an earlier run has been, it reads what they left.
"""

import os
from pathlib import Path

import pytest

OUTPUTS = ("data", "runs", "lightning_logs")
"""Where commands write by default, if nobody tells them where: old files must not change there either."""


def snapshot(root: Path) -> dict[str, int]:
    """Every path under `root`, for outputs with the time of their last change.

    Sources count without it, as people edit them meanwhile. Left out are environments and the caches of
    Python and of tools: what starts with a dot, `__pycache__`, `*.egg-info`.
    """
    times: dict[str, int] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _of_tools(name)]
        for name in (*folders, *files):
            if not _of_tools(name):
                path = Path(folder, name)
                relative = path.relative_to(root)
                is_output = relative.parts[0] in OUTPUTS and name in files
                times[relative.as_posix()] = path.lstat().st_mtime_ns if is_output else 0
    return times


def _of_tools(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name.endswith(".egg-info")


class CheckoutGuard:
    """Compares the checkout before and after; for the process that hands out the tests, not for its workers.

    Args:
        root: of the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: dict[str, int] = {}
        self.written: list[str] = []

    def pytest_sessionstart(self) -> None:
        self.before = snapshot(self.root)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        after = snapshot(self.root)
        self.written = sorted(path for path, time in after.items() if self.before.get(path) != time)
        if self.written and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.written:
            listed = ", ".join(self.written[:10]) + (" and more" if len(self.written) > 10 else "")
            terminalreporter.write_sep("=", "written into the checkout", red=True)
            terminalreporter.write_line(
                f"FAILED: {listed}. Tests write under `tmp_path` alone: give `root=` to the data module and "
                "`default_root_dir` to the Trainer."
            )
