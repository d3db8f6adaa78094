"""`--seeds 0 1 2`: the same command once for each seed, each in a sub-folder of the run's folder."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from featherlight_recipes import refuse

OPTION = "--seeds"
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def sweep(arguments: Sequence[str]) -> int:
    """Run the command for each seed, one after the other, each in a process of its own.

    The runs are in `seed_0`, `seed_1`, ... of the folder that the command would have had, which `featherlight
    results` takes as one row. It stops at the first seed that fails.

    Args:
        arguments: the command line without the program's name, `--seeds` among it.

    Returns:
        The exit status of the last run.
    """
    start = arguments.index(OPTION)
    count = next(
        (place for place, word in enumerate(arguments[start + 1 :]) if not word.isdecimal()),
        len(arguments) - start - 1,
    )
    seeds = [str(int(word)) for word in arguments[start + 1 : start + 1 + count]]
    others = [*arguments[:start], *arguments[start + 1 + count :]]
    if not seeds or len(set(seeds)) < len(seeds):
        return refuse(f"{OPTION}: expected whole numbers, each once, such as `{OPTION} 0 1 2`")
    if OPTION in others or any(word.partition("=")[0] == "--seed_everything" for word in others):
        return refuse(
            f"{OPTION}: says which seeds there are, and is given once and without --seed_everything"
        )
    for seed in seeds:
        print(f"seed {seed} of {', '.join(seeds)}", flush=True)
        if status := _run([*others, "--seed_everything", seed], f"seed_{seed}"):
            return status
    if others[0] == "fit":
        again = [word for word in others[1:] if word != "--overwrite"]
        print(f"next: featherlight test {shlex.join(again)} --ckpt_path auto {OPTION} {' '.join(seeds)}")
    return 0


def _run(arguments: Sequence[str], subfolder: str) -> int:
    """One run in a process of its own, which hears the signals that this one gets."""
    outer = os.environ.get("FEATHERLIGHT_RUN_SUBFOLDER")
    environment = {
        **os.environ,
        "FEATHERLIGHT_RUN_SUBFOLDER": os.path.join(outer, subfolder) if outer else subfolder,
    }
    command = [sys.executable, str(Path(__file__).with_name("featherlight.py")), *arguments]
    with subprocess.Popen(command, env=environment) as process:
        usual = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in _FORWARDED}
        try:
            status = process.wait()
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status
