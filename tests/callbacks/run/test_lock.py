import multiprocessing
import os
import signal
import time

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import RunCheckpoint, RunLock
from callbacks.run import lock
from callbacks.run.lock import FolderLock
from lightning_modules import ImageClassifier


def hold(folder, children):
    FolderLock(folder)
    child = os.fork()  # as a loader's worker, which outlives a killed run for a while
    if child:
        children.put(child)
    time.sleep(60)
    os._exit(0)


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that holds the lock of `tmp_path / "run"`."""
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)
    context = multiprocessing.get_context("fork")
    children = context.SimpleQueue()
    process = context.Process(target=hold, args=(tmp_path / "run", children))
    process.start()
    child = children.get()
    yield process
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.join()


def fit(trainer, blob_data, folder, **options):
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    callbacks = [RunLock(), RunCheckpoint(**options)]
    run = trainer(
        default_root_dir=str(folder), enable_checkpointing=True, callbacks=callbacks, limit_train_batches=1
    )
    run.fit(module, datamodule=blob_data())


def test_a_second_run_is_refused_until_the_first_is_dead(holder, trainer, blob_data, tmp_path):
    expected = rf"run' is in use by another run \(process {holder.pid} on .*trainer.default_root_dir"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(trainer, blob_data, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(MisconfigurationException, match="run' is in use"):
        fit(trainer, blob_data, tmp_path / "other", dirpath=str(tmp_path / "run"))
    assert not (tmp_path / "other" / ".lock").exists()

    holder.kill()  # its child lives on
    holder.join()
    fit(trainer, blob_data, tmp_path / "run")
    fit(trainer, blob_data, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not (tmp_path / "run" / ".lock").exists()


def test_only_fit_locks(holder, trainer, blob_data, tmp_path):
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    run = trainer(default_root_dir=str(tmp_path / "run"), callbacks=[RunLock()])
    run.test(module, datamodule=blob_data())


def test_a_failed_run_gives_the_lock_back(trainer, blob_data, tmp_path):
    class Fails(ImageClassifier):
        def on_train_start(self):
            raise RuntimeError("broken")

    run = trainer(callbacks=[RunLock()])
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(Fails("test_vit", 4, model_args={"img_size": 32}), datamodule=blob_data())
    assert not (tmp_path / ".lock").exists()


def test_unfinished_files_of_killed_runs_are_removed(trainer, blob_data, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in (".last.ckpt.123.partial", ".epoch=1-step=8.ckpt.9.partial", ".mine.partial"):
        (folder / name).write_bytes(b"half")
    fit(trainer, blob_data, tmp_path / "run")
    assert [path.name for path in folder.glob(".*")] == [".mine.partial"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match=r"The folder '.*file/run' cannot be written"):
        FolderLock(tmp_path / "file" / "run")
