"""Which errors are the user's to mend, and what is said of them: one sentence, on one rank."""

import dis
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pickle import UnpicklingError
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.run.escaping import printable
from callbacks.run.quiet import OURS
from datamodules.reading import CorruptSampleError
from featherlight_options import one_line, shortened
from lightning_modules.parts.finite import NotFiniteError
from lightning_modules.parts.weights import examples

USER_ERRORS = (MisconfigurationException, FileNotFoundError, UnpicklingError, CorruptSampleError)
PATIENCE = 10.0  # seconds that a rank gives rank 0 to say the same

_BUGS = (AttributeError, NameError, AssertionError, NotImplementedError, RecursionError, SyntaxError)
"""Not the user's; a class of others may object by an assertion to options that it was given."""
_MAKING = frozenset(
    (
        *("parse_arguments", "save_config", "instantiate_classes", "configure_optimizers"),
        *(f"{split}_dataloader" for split in ("train", "val", "test", "predict")),
    )
)
"""Functions that hand the user's options on to classes, of ours or of others, which may object."""
_RAISE = dis.opmap["RAISE_VARARGS"]


def sentence_of(error: BaseException) -> str | None:
    """What to say of an error that is the user's to mend, on one line; None for a bug, which has a traceback.

    An error is the user's by its type (our own kinds, anything of the operating system, memory) or by its
    origin: raised on purpose by our code, objected by a class that was given the user's options, or one of
    the few that torch and Lightning raise about checkpoints, devices and workers.
    """
    text = printable(one_line(str(error)))
    for known in (_of_a_worker, _of_the_system, _of_torch):
        if (sentence := known(error, text)) is not None:
            return sentence
    if isinstance(error, (*USER_ERRORS, NotFiniteError)):
        return text or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and not _on_purpose(error):
        return f"the package '{error.name}' is needed here and not installed ({text})."
    if not isinstance(error, Exception):
        return None
    if _on_purpose(error):
        return None if isinstance(error, _BUGS) else text
    return _of_a_constructor(error, text)


def _frames(error: BaseException) -> Iterator[TracebackType]:
    place = error.__traceback__
    while place is not None:
        yield place
        place = place.tb_next


def _on_purpose(error: BaseException) -> bool:
    """Whether our code has raised it, rather than met it."""
    last = list(_frames(error))[-1:]
    if not last or not _is_ours(last[0]):
        return False
    return last[0].tb_frame.f_code.co_code[last[0].tb_lasti] == _RAISE


def _is_ours(place: TracebackType) -> bool:
    return place.tb_frame.f_code.co_filename.startswith(OURS)


def _of_a_constructor(error: Exception, text: str) -> str | None:
    """What a class says of the options that it was given; names the class."""
    places = list(_frames(error))
    if not any(place.tb_frame.f_code.co_name in _MAKING for place in places):
        return None
    if isinstance(error, _BUGS) and (_is_ours(places[-1]) or not isinstance(error, AssertionError)):
        return None
    if _is_of_a_bug(error):
        return None
    if (cause := error.__cause__) is not None and (said := sentence_of(cause)) is not None:
        return said  # jsonargparse wraps what a constructor raised
    if text.startswith(("Does not validate", "Problem with given class_path")):
        return shortened(str(error))
    owners = [
        type(frame.f_locals["self"]).__name__
        for place in places
        if (frame := place.tb_frame).f_code.co_name == "__init__" and "self" in frame.f_locals
    ]
    known = next((name for name in owners if name not in ("FeatherlightCLI", "LightningCLI")), None)
    return text if known is None or known in text else f"{known}: {text or type(error).__name__}"


def _is_of_a_bug(error: BaseException) -> bool:
    """Whether a line of our own code has stumbled, which no option should make it do."""
    while error.__cause__ is not None:
        error = error.__cause__
    places = list(_frames(error))
    if places and places[-1].tb_frame.f_code.co_name == "__getattr__":  # of torch's Module
        places.pop()
    kinds = (*_BUGS, KeyError, IndexError, ZeroDivisionError)
    return isinstance(error, kinds) and bool(places) and _is_ours(places[-1]) and not _on_purpose(error)


def _of_a_worker(error: BaseException, text: str) -> str | None:
    """An error that happened in a process of a loader, and came back with its traceback as its message."""
    if re.match(r"DataLoader worker.* (is killed by signal|exited unexpectedly)", text):
        return (
            f"a process of the loader died ({text.partition('. ')[0]}); usually memory runs out: lower "
            "data.init_args.num_workers or batch_size, or set num_workers to 0 to see the reason."
        )
    if not re.match(r"Caught \w+ in ", text):
        return None
    story = str(error).rpartition("Traceback (most recent call last):\n")[2]
    frames = re.findall(r'^  File "(.*)", line .*\n +(.*)', story, re.MULTILINE)
    end = re.search(r"^([\w.]+): (.*)\Z", story, re.MULTILINE | re.DOTALL)
    on_purpose = bool(frames) and frames[-1][0].startswith(OURS) and frames[-1][1].startswith("raise ")
    if end is None or not (on_purpose or isinstance(error, (*USER_ERRORS, OSError, MemoryError))):
        return None
    return printable(one_line(end[2]))


def _of_the_system(error: BaseException, text: str) -> str | None:
    """Disks, files, permissions, memory, network."""
    if isinstance(error, MemoryError):
        return f"the memory of this machine does not suffice ({text or 'MemoryError'})."
    if not isinstance(error, OSError):
        return None
    if error.errno is None or error.strerror is None:
        return text or type(error).__name__
    where = f" '{printable(os.fsdecode(error.filename))}'" if isinstance(error.filename, (str, bytes)) else ""
    hint = {
        errno.ENOSPC: "the disk is full: make room, or choose another (trainer.default_root_dir)",
        errno.EDQUOT: "the quota is used up: make room, or choose another disk (trainer.default_root_dir)",
        errno.EROFS: "the disk is read-only: choose another (trainer.default_root_dir, root of the data)",
        errno.EACCES: "the permission is missing",
        errno.EPERM: "the permission is missing",
        errno.ENOTDIR: "a file is where a folder is needed",
        errno.EISDIR: "a folder is where a file is needed",
        errno.EEXIST: "something of that name is there already",
        errno.ENOENT: "it is not there",
        errno.EMFILE: "too many files are open: raise `ulimit -n`, or lower data.init_args.num_workers",
        errno.ENAMETOOLONG: "the name is too long",
    }.get(error.errno)
    return f"{error.strerror}{where}{f': {hint}' if hint else ''}."


def _of_torch(error: BaseException, text: str) -> str | None:
    """The errors of torch and Lightning that say something about checkpoints, devices or options."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in text:
        return (
            f"the memory of the device does not suffice: lower data.init_args.batch_size "
            f"({text.partition('. ')[0]})."
        )
    if isinstance(error, RuntimeError) and re.search(r"[Gg]loo|Connection closed by peer|NCCL", text):
        reason = text.partition(". ")[0]
        return f"other ranks have gone; what ended them is said there ({reason})."
    if text.startswith("Error(s) in loading state_dict for"):
        return _misfit(str(error))
    if re.match(r"loaded state dict (contains a parameter group|has a different number)", text):
        return (
            f"the checkpoint's optimiser does not fit this one ({text}): resume with the same model and "
            "optimiser, or give the file as model.init_args.weights to start from its weights alone."
        )
    places = [place.tb_frame.f_code for place in _frames(error)]
    if any(
        code.co_filename.endswith("checkpoint_connector.py") and "re" in code.co_name[:4] for code in places
    ):
        return _of_a_restore(error, text)
    if text.startswith("Tried to step ") and "total steps" in text:  # OneCycleLR's
        return f"lr_scheduler: the run is longer than its schedule, set total_steps to its length ({text})."
    if isinstance(error, ValueError) and any(code.co_name == "_parse_ckpt_path" for code in places):
        return f"ckpt_path: {text}"
    if isinstance(error, KeyError) and places and re.search(r"[/\\]optim[/\\]", places[-1].co_filename):
        return (
            f"the optimiser's state lacks {text}: the checkpoint is of another optimiser. Resume with the "
            "same one, or give the file as model.init_args.weights to start from its weights alone."
        )
    if re.search(r"No CUDA GPUs are available|Torch not compiled with CUDA|Found no NVIDIA driver", text):
        return f"{text.partition('. ')[0].rstrip('.')}: set trainer.accelerator to cpu."
    if "Expected more than 1 value per channel when training" in text:
        return (
            "a batch norm cannot train on a single value per channel: use a larger data.init_args.batch_size "
            "or larger images, or set drop_last: true."
        )
    return None


def _of_a_restore(error: BaseException, text: str) -> str | None:
    """What a checkpoint lacks that Lightning, or a callback, looks for in it."""
    if isinstance(error, (*USER_ERRORS, *_BUGS)) or not isinstance(error, Exception) or _on_purpose(error):
        return None
    return (
        f"the file of ckpt_path is no checkpoint of such a run ({type(error).__name__}: {text}): weights "
        "alone are given as model.init_args.weights."
    )


def _misfit(message: str) -> str:
    """The first names of `load_state_dict`'s lists, and how long they are."""
    network = message.partition("for ")[2].partition(":")[0]
    parts = []
    for title, pattern in (("missing", "Missing key"), ("unexpected", "Unexpected key")):
        if found := re.search(rf"{pattern}\(s\) in state_dict: (.*?)\. *$", message, re.MULTILINE):
            names = re.findall(r'"(.*?)"', found[1])
            parts.append(f"{len(names)} {title}: {examples(names)}")
    shapes = re.findall(
        r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", message, re.DOTALL
    )
    if shapes:
        listed = [f"{name}: {theirs} in the file, {ours} in the model" for name, theirs, ours in shapes]
        parts.append(f"{len(listed)} of another shape: {examples(listed)}")
    return f"the checkpoint does not fit {network}: {'; '.join(parts) or one_line(message)}."


def guarded(command: Callable[[], Any], debug: bool = False, training: bool = False) -> int:
    """Run a command; print what is the user's to mend as one sentence.

    Args:
        command: what to run.
        debug: let every error through, with its traceback.
        training: whether numbers that are none are those of a training that diverged.

    Returns:
        The exit status: 0, 1 where training diverged, or 2.
    """
    in_threads: list[str] = []  # a logger's thread that cannot write; the run itself may end well

    def remember(failure: threading.ExceptHookArgs) -> None:
        sentence = None if failure.exc_value is None or debug else sentence_of(failure.exc_value)
        if sentence is None:
            usual(failure)
        else:
            in_threads.append(sentence)

    usual, threading.excepthook = threading.excepthook, remember
    try:
        command()
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or debug:
            raise
        say(sentence)
        return 1 if training and isinstance(error, NotFiniteError) else 2
    finally:
        threading.excepthook = usual
    for sentence in dict.fromkeys(in_threads):
        print(f"featherlight: warning: the log is not complete: {sentence}", file=sys.stderr)
    return 0


def say(sentence: str) -> None:
    """Print the sentence, once for all ranks: the others wait a little, in which rank 0's launcher ends them.

    What only one rank has met is still said, by that rank.
    """
    rank = next(
        (os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0"
    )
    if rank != "0":
        sys.stdout.flush()
        time.sleep(PATIENCE)
        sentence = f"{sentence} (rank {rank})"
    print(f"featherlight: error: {sentence}", file=sys.stderr, flush=True)
