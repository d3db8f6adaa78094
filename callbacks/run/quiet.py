"""What libraries say that helps nobody who trains: known sentences, by name, and nothing else."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

NOISE = (
    # said of every run, and said better by `RunSummary`
    r"Seed set to \d+",
    r"(GPU|TPU|HPU) available: ",
    r"LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES: ",
    r"Loading `\w+` to estimate number of stepping batches",
    r"`Trainer\.fit` stopped: `max_(epochs|steps)=",
    r"(Restoring states|Restored all states|Loaded model weights) from the checkpoint",
    # an advertisement of another product
    r".{0,4}Tip: For seamless cloud",
    # about the inside of Lightning, or of what it calls
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"`?(torch\.)?_?jit[.\w]*`? is deprecated",
    r"The `srun` command is available on your system but is not used",
    # `LogLines`, `RunCheckpoint`, `FolderLock`, `LogInterval` see to it
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    r"You are using `?LearningRateMonitor`? callback with models that have no learning rate schedulers",
    r"Experiment logs directory .* exists and is not empty",
)
"""How each of them begins."""

_KNOWN = re.compile("|".join(NOISE))
OURS = tuple(
    str(Path(__file__).resolve().parents[2] / name)
    for name in ("callbacks", "datamodules", "lightning_modules", "featherlight")
)
"""What the names of our own files begin with."""


def is_noise(message: str) -> bool:
    """Whether a sentence of a library is among `NOISE`."""
    return _KNOWN.match(message.lstrip()) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `NOISE` out of the log for the time of a block; our own warnings lose the place in the code."""
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    usual = warnings.formatwarning
    with warnings.catch_warnings():
        for beginning in NOISE:
            warnings.filterwarnings("ignore", message=beginning)
        for handler in handlers:
            handler.addFilter(_passes)
        warnings.formatwarning = _format
        try:
            yield
        finally:
            warnings.formatwarning = usual
            for handler in handlers:
                handler.removeFilter(_passes)


_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "")


def _passes(record: logging.LogRecord) -> bool:
    return not is_noise(record.getMessage())


def _format(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """As Lightning prints it: without the line of code; for a file of ours also without its name."""
    return f"warning: {message}\n" if filename.startswith(OURS) else f"{filename}:{lineno}: {message}\n"
