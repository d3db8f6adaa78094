"""Which errors are said in one sentence, and which keep their traceback."""

import errno
import os
import sys
import threading

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datamodules import CorruptSampleError
from datamodules.text.corpora import packed_segments
from featherlight_errors import PATIENCE, guarded, sentence_of
from lightning_modules.parts.finite import NotFiniteError


def raised(function, *arguments):
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise self.error from cause


def first_of(error):
    return raised(lambda: next(iter(DataLoader(Broken(error), num_workers=1))))


def test_what_a_worker_met_is_said_as_it_was_said_there():
    assert sentence_of(first_of(CorruptSampleError("cannot read a.png\n(cut)"))) == "cannot read a.png (cut)"
    error = first_of(MisconfigurationException("no label\n(cut)"))
    assert "Traceback" in str(error)
    assert sentence_of(error) == "no label (cut)"
    assert sentence_of(first_of(PermissionError(errno.EACCES, "Permission denied", "a.png"))) == (
        "[Errno 13] Permission denied: 'a.png'"
    )


def test_a_bug_keeps_its_traceback_wherever_it_happens():
    assert sentence_of(first_of(KeyError("label"))) is None
    assert sentence_of(raised(lambda: None.shape)) is None
    assert sentence_of(raised(lambda: {}["label"])) is None
    assert sentence_of(raised(int, "one")) is None
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


def test_what_our_code_raises_on_purpose_is_a_sentence():
    error = raised(packed_segments, torch.arange(3), 4)
    assert type(error) is ValueError
    assert sentence_of(error).startswith("The text has 3 tokens")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.ENOTDIR, "file"),
    ],
)
def test_disks_are_named_with_what_helps(number, said):
    sentence = sentence_of(OSError(number, os.strerror(number), "runs/a"))
    assert "'runs/a'" in sentence
    assert said in sentence


def test_a_checkpoint_of_another_model_is_a_count_and_some_names():
    small, large = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    sentence = sentence_of(raised(small.load_state_dict, large.state_dict()))
    assert "38 unexpected: 1.weight" in sentence
    assert "2 of another shape: 0.weight: [3, 3] in the file, [2, 2] in the model" in sentence
    assert len(sentence) < 500


def test_torch_says_nothing_of_running_code(tmp_path):
    error = raised(nn.BatchNorm1d(2).train(), torch.ones(1, 2))
    assert "batch_size" in sentence_of(error)
    assert "batch_size" in sentence_of(torch.OutOfMemoryError("CUDA out of memory. Tried"))


def test_statuses(capsys):
    def stop(error):
        raise error

    assert guarded(lambda: None) == 0
    assert guarded(lambda: stop(MisconfigurationException("a\n  b"))) == 2
    assert capsys.readouterr().err == "featherlight: error: a b\n"
    assert guarded(lambda: stop(NotFiniteError("nan")), training=True) == 1
    assert guarded(lambda: stop(NotFiniteError("nan"))) == 2
    with pytest.raises(MisconfigurationException):
        guarded(lambda: stop(MisconfigurationException("a")), debug=True)


def test_only_what_rank_0_may_not_know_is_said_by_others(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr("featherlight_errors.time.sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    assert guarded(lambda: os.stat("/nowhere/at/all")) == 2
    assert capsys.readouterr().err.endswith("(rank 1)\n")
    assert waits == [PATIENCE]


def test_a_logger_that_cannot_write_prints_no_traceback(capsys):
    def command():
        def write():
            raise OSError(errno.ENOSPC, "No space left on device")

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    before = threading.excepthook
    assert guarded(command) == 0
    printed = capsys.readouterr().err
    assert "warning" in printed
    assert "Traceback" not in printed
    assert threading.excepthook is before


def test_names_in_a_sentence_are_printable():
    name = b"caf\xe9\x1b.png".decode(sys.getfilesystemencoding(), "surrogateescape")
    assert sentence_of(CorruptSampleError(f"cannot read {name}")) == "cannot read caf\\xe9\\x1b.png"
