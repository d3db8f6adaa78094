"""The commands of `quickstart.sh`, small: the log has no warning, and ends with what was gained."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "quickstart.sh"
SMALL = {
    "data.init_args.sample_size": 128,
    "data.init_args.train_images": 64,
    "data.init_args.num_workers": 0,
    "data.init_args.batch_size": 32,
    "trainer.max_epochs": 1,
    "trainer.check_val_every_n_epoch": 1,
}
NOISE = re.compile(r"warn|deprecat|site-packages|error|traceback|\btip\b|\bhint\b|litlogger", re.IGNORECASE)


@pytest.fixture
def commands(tmp_path):
    """What the script calls, word by word."""
    (tmp_path / "bin").mkdir()
    recorder = tmp_path / "bin" / "featherlight"
    recorder.write_text('#!/usr/bin/env bash\nprintf "%q " "$@" >>calls\necho >>calls\n')
    recorder.chmod(0o755)
    path = f"{recorder.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", SCRIPT], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.timeout(900)  # a minute of work, on a busy machine many
def test_the_quick_start_is_quiet_and_ends_with_what_was_gained(commands, featherlight, tmp_path):
    assert [command[0] for command in commands] == [*["fit", "test"] * 3, "test", "predict", "results"]
    del commands[5], commands[1]  # as the test of the student alone
    for command in commands:
        small = [] if command[0] == "results" else [f"--{name}={value}" for name, value in SMALL.items()]
        if command[0] == "test":
            small.append("--trainer.callbacks.repeats=3")
        done = featherlight(*command, *small)
        log = done.stdout + done.stderr
        assert not NOISE.search(log), log
    said = " ".join(done.stdout.split())
    assert "distilled: no results.json" in said
    words = (
        r"int8 against alone: top1 \S+ for \S+ \(\S+ points\), (\S+) times the size, "
        r"\S+ times the latency of its float32 form\.$"
    )
    assert float(re.search(words, said)[1]) < 0.6
    assert (tmp_path / "runs/quickstart/distilled/contact_sheet.png").exists()
