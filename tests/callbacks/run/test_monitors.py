import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.run.checkpointing import RunCheckpoint
from callbacks.run.monitors import MonitorCheck
from lightning_modules import ImageClassifier


def classifier(**options):
    return ImageClassifier("test_vit", num_classes=4, model_args={"img_size": 32}, **options)


def plateau(optimizer):
    from lightning.pytorch.cli import ReduceLROnPlateau

    return ReduceLROnPlateau(optimizer, monitor="val/top3")


@pytest.mark.parametrize(
    ("callback", "scheduler", "message"),
    [
        (
            RunCheckpoint(monitor="val/top11"),
            None,
            "RunCheckpoint: monitor is 'val/top11'.*did you mean val/top1",
        ),
        (EarlyStopping("val_loss"), None, "EarlyStopping: monitor is 'val_loss'.*reports val/loss, val/top1"),
        (EarlyStopping("val/loss"), plateau, "ReduceLROnPlateau: monitor is 'val/top3'"),
    ],
)
def test_a_wrong_monitor_is_refused_before_the_first_step(trainer, blob_data, callback, scheduler, message):
    run = trainer(
        callbacks=[callback, MonitorCheck()], enable_checkpointing=isinstance(callback, RunCheckpoint)
    )
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(classifier(lr_scheduler=scheduler), blob_data())
    assert run.global_step == 0


def test_right_monitors_pass(trainer, blob_data):
    callbacks = [EarlyStopping("val/loss"), EarlyStopping("train/loss"), RunCheckpoint(monitor="val/top1")]
    run = trainer(callbacks=[*callbacks, MonitorCheck()], enable_checkpointing=True, limit_train_batches=1)
    run.fit(classifier(), blob_data())
    assert run.global_step == 1
