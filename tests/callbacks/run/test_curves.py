import pytest
from lightning.pytorch.loggers import CSVLogger

from callbacks.run.curves import LearningRates, LogInterval
from lightning_modules import ImageClassifier


def test_a_short_run_has_losses_and_rate_in_its_log(trainer, blob_data, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="logs")
    run = trainer(callbacks=[LogInterval(), LearningRates()], logger=logger, max_epochs=2)
    run.fit(ImageClassifier("test_vit", num_classes=4, model_args={"img_size": 32}), blob_data())
    rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    heads = rows[0].split(",")
    count = {head: sum(bool(row.split(",")[place]) for row in rows[1:]) for place, head in enumerate(heads)}
    assert (count["train/loss"], count["val/loss"], count["lr-AdamW"]) == (8, 2, 8)


@pytest.mark.parametrize(
    ("batches", "options", "interval"),
    [
        (40, {}, 4),
        (3, {}, 1),
        (2000, {}, 50),
        (2000, {"max_steps": 30}, 3),
        (80, {"accumulate_grad_batches": 4}, 2),
    ],
)
def test_ten_points_an_epoch_or_one_in_50_steps(trainer, monkeypatch, batches, options, interval):
    run = trainer(**options)
    monkeypatch.setattr(type(run), "num_training_batches", batches)
    LogInterval().on_train_start(run, None)
    assert run.log_every_n_steps == interval


def test_no_logger_no_rates(trainer, blob_data):
    run = trainer(callbacks=[LearningRates()], limit_train_batches=1, limit_val_batches=0)
    run.fit(ImageClassifier("test_vit", num_classes=4, model_args={"img_size": 32}), blob_data())
    assert run.global_step == 1
