"""The last lines of a `fit`."""

import pytest

from callbacks.run.checkpointing import RunCheckpoint
from callbacks.run.summary import _ending
from lightning_modules import ImageClassifier


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_metric_that_was_never_measured_is_named(trainer, blob_data):
    options = {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": True}
    run = trainer(callbacks=[RunCheckpoint(monitor="val/top1")], **options)
    run.fit(ImageClassifier("test_vit", num_classes=4, model_args={"img_size": 32}), blob_data(length=16))
    assert "the last (no val/top1 was measured)" in "\n".join(_ending(run))
