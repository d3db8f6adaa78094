"""A process that has imported the command and forks for every call of it.

Importing torch, Lightning, timm and transformers takes most of the time of a small run. A call is a process
all the same: with its own folder, environment, standard files, signals and exit status. What needs the
interpreter's own start (launchers of several ranks, the installed script) does not go this way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


class Call:
    """One call, as `subprocess.Popen` shows it."""

    def __init__(self, owner: "Prepared", pid: int) -> None:
        self._owner, self.pid = owner, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._owner.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status.

        Raises:
            TimeoutError: it still ran after `timeout` seconds, and was killed.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"`featherlight` still ran after {timeout} s")
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        os.kill(self.pid, number)


class Prepared:
    """The process that forks; it ends with the one that made it."""

    def __init__(self, script: Path) -> None:
        command = [sys.executable, __file__, str(script)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(
        self, arguments: Sequence[object], cwd: Path, environment: Mapping[str, str], out: Path, err: Path
    ) -> Call:
        """Call the command; standard input is empty, output goes to two files."""
        words = [str(argument) for argument in arguments]
        files = {"cwd": str(cwd), "out": str(out), "err": str(err)}
        return Call(self, self.ask({"arguments": words, "environment": dict(environment), **files}))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def become(request: Mapping[str, Any], script: str) -> None:
    """Make this process a call."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], flags),
        (2, request["err"], flags),
    ):
        descriptor = os.open(path, mode, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = [script, *request["arguments"]]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*given, *(path for path in sys.path if path not in given)]


def serve(requests: IO[str], script: str) -> bool:
    """Fork for each request; True in a child that has a call to make, False at the end."""
    answers = os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                become(request, script)
                return True
        print(json.dumps(answer), file=answers, flush=True)
    return False


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    import callbacks  # noqa: F401
    import datamodules  # noqa: F401
    import featherlight
    import featherlight_cli  # noqa: F401
    import lightning_modules  # noqa: F401

    if serve(sys.stdin, sys.argv[1]):
        sys.exit(featherlight.main())
