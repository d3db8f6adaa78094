import os
import resource
import signal
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import AtomicCheckpointIO, Preemption, RunCheckpoint
from callbacks.run.checkpointing import newest_loadable
from callbacks.run.directory import checkpoint_directory
from lightning_modules import ImageClassifier


class Fails:
    """Not picklable: the write breaks off half-way, as it does on a full disk."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(
        OSError, match=r"last.ckpt' could not be written.*No space left.*previous 'last.ckpt' is intact"
    ):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(100_000), "step": Fails()}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"], "no partial file is left"


def test_a_disk_that_fills_up_while_writing_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last.ckpt' could not be written.*is intact"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"a.ckpt' could not be written.*no file of that name was there"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "a.ckpt")


def test_runs_keep_their_last_and_best(trainer, blob_data, tmp_path):
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    run = trainer(
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=[RunCheckpoint(monitor="val/top1")],
        plugins=[AtomicCheckpointIO()],
    )
    run.fit(module, datamodule=blob_data())
    names = sorted(path.name for path in checkpoint_directory(tmp_path).iterdir())
    assert len(names) == 2
    assert names[1] == "last.ckpt"
    assert torch.load(checkpoint_directory(tmp_path) / "last.ckpt", weights_only=True)["global_step"] == 8


def test_epochs_without_validation_are_saved_too(trainer, blob_data, tmp_path):
    class Peek(Callback):
        steps = ()

        def on_train_epoch_start(self, trainer, module):
            path = checkpoint_directory(tmp_path) / "last.ckpt"
            saved = torch.load(path, weights_only=True)["global_step"] if path.exists() else 0
            self.steps = (*self.steps, saved)

    peek = Peek()
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    options = {"max_epochs": 4, "check_val_every_n_epoch": 3, "enable_checkpointing": True}
    trainer(callbacks=[peek, RunCheckpoint()], **options).fit(module, datamodule=blob_data())
    assert peek.steps == (0, 4, 8, 12)
    assert torch.load(checkpoint_directory(tmp_path) / "last.ckpt", weights_only=True)["global_step"] == 16


class Calibrated(ImageClassifier):
    """Learns something in validation, as a detector does its threshold."""

    def __init__(self):
        super().__init__("test_vit", 4, model_args={"img_size": 32})
        self.register_buffer("threshold", torch.tensor(0.0))

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.threshold += 1


@pytest.mark.parametrize("interval", [None, 4, 3])
def test_the_last_checkpoint_knows_the_last_validation(trainer, blob_data, tmp_path, interval):
    options = {"max_epochs": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    run = trainer(callbacks=[RunCheckpoint(every_n_train_steps=interval)], **options)
    run.fit(Calibrated(), datamodule=blob_data())
    saved = torch.load(checkpoint_directory(tmp_path) / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert saved["state_dict"]["threshold"] == 2


def test_auto_takes_the_newest_that_loads(tmp_path):
    assert newest_loadable(tmp_path) is None
    folder = checkpoint_directory(tmp_path)
    folder.mkdir()
    now = time.time()
    for age, name in enumerate(["truncated.ckpt", "new.ckpt", "old.ckpt"]):
        torch.save({"state_dict": {"w": torch.ones(1000)}}, folder / name)
        os.utime(folder / name, (now - 60 * age, now - 60 * age))
    whole = (folder / "truncated.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    os.utime(folder / "truncated.ckpt", (now + 5, now + 5))
    (folder / ".last.ckpt.77.partial").write_bytes(b"left by a killed writer")
    with pytest.warns(UserWarning, match=r"truncated.ckpt' is passed over"):
        assert newest_loadable(tmp_path) == str(folder / "new.ckpt")
    (folder / "gone.ckpt").symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"gone.ckpt' is passed over"):
        assert newest_loadable(tmp_path) == str(folder / "new.ckpt")


class TermAt(Callback):
    """Sends this process SIGTERM in an optimiser step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_signal_saved_is_found_again_wherever_the_user_wants_checkpoints(
    trainer, blob_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    callbacks = [RunCheckpoint(dirpath="elsewhere", every_n_train_steps=2), Preemption(), TermAt(2)]
    with pytest.raises(SystemExit):
        trainer(enable_checkpointing=True, callbacks=callbacks).fit(module, datamodule=blob_data())
    found = newest_loadable(tmp_path / "run", "elsewhere")
    assert found == str(tmp_path / "elsewhere" / "last.ckpt")
    assert torch.load(found, weights_only=True)["global_step"] == 3
    assert not (tmp_path / "run").exists()


def test_checkpoints_at_an_address_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"checkpoint.dirpath is 's3://bucket'"):
        newest_loadable(tmp_path, "s3://bucket")


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "last.ckpt", []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(file):
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    def watch_replace(source, target):
        assert os.stat(source).st_ino in synced
        assert torch.load(source, weights_only=True)["step"] == 1, "nothing is written after that"
        replace(source, target)
        synced.append("in place")

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, path)
    assert synced[-1] == "in place"
    assert path.is_file()


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_auto_reads_every_byte(tmp_path, place):
    """Zeros in the middle of a tensor: the file opens, and only its checksums tell."""
    folder = checkpoint_directory(tmp_path)
    for name in ("old.ckpt", "last.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.rand(50_000)}}, folder / name)
    content = bytearray((folder / "last.ckpt").read_bytes())
    start = int(place * len(content))
    content[start : start + 20_000] = bytes(20_000)
    (folder / "last.ckpt").write_bytes(content)
    os.utime(folder / "last.ckpt", (time.time() + 5,) * 2)
    torch.load(folder / "last.ckpt", weights_only=True)  # torch does not mind
    with pytest.warns(UserWarning, match=r"last.ckpt' is passed over.*checksum"):
        assert newest_loadable(tmp_path) == str(folder / "old.ckpt")


def finished(trainer, blob_data, **options):
    """A run of two epochs with all its checkpoints; gives a function that resumes it."""

    def fit(path=None):
        run = trainer(
            max_epochs=2,
            enable_checkpointing=True,
            callbacks=[RunCheckpoint(**options)],
            plugins=[AtomicCheckpointIO()],
        )
        module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
        run.fit(module, datamodule=blob_data(), ckpt_path=path)

    fit()
    return fit


@pytest.mark.parametrize("state", ["old", "truncated", "missing", "newer"])
def test_last_is_brought_up_to_date_by_a_run_that_was_over(trainer, blob_data, tmp_path, state):
    resume = finished(trainer, blob_data, save_top_k=-1)
    first, second, last = sorted(checkpoint_directory(tmp_path).glob("*.ckpt"))
    final = second.read_bytes()
    if state == "old":
        last.write_bytes(first.read_bytes())
    elif state == "truncated":
        last.write_bytes(final[:9000])
    elif state == "missing":
        last.unlink()
    else:
        checkpoint = torch.load(last, weights_only=True)
        torch.save({**checkpoint, "global_step": 100}, last)
    os.utime(second, (time.time() + 5,) * 2)
    resume(second)
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == (100 if state == "newer" else 8)
    if state != "newer":
        assert last.read_bytes() == final


def test_what_a_killed_run_should_have_deleted_is_deleted_and_nothing_else(trainer, blob_data, tmp_path):
    resume = finished(trainer, blob_data)
    folder = checkpoint_directory(tmp_path)
    kept = folder / "epoch=1-step=8.ckpt"
    orphan, mine, later = (
        folder / f"{name}.ckpt" for name in ("epoch=0-step=4", "my best", "epoch=9-step=40")
    )
    for path in (orphan, mine):
        path.write_bytes(kept.read_bytes())
    torch.save({**torch.load(kept, weights_only=True), "global_step": 40}, later)
    foreign = folder / "epoch=0-step=2.ckpt"
    torch.save({"state_dict": {}, "global_step": 2}, foreign)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"] = dict.fromkeys(
        ("ready", "started", "processed", "completed"), 1
    )
    source = folder / "epoch=1-step=7.ckpt"  # what the run goes on from stays, whatever it is called
    torch.save(checkpoint, source)  # one more epoch to train
    resume(source)
    assert {path.name for path in folder.iterdir()} == {
        "epoch=1-step=7.ckpt",
        "last.ckpt",
        "my best.ckpt",
        "epoch=9-step=40.ckpt",
        "epoch=0-step=2.ckpt",
        "epoch=1-step=12.ckpt",
    }
