import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric

import lightning_modules  # noqa: F401 (importing it is what spares the moves)


def logged(results: _ResultCollection, value: torch.Tensor, **options) -> _ResultMetric:
    results.log("training_step", "loss", value, **options)
    return results["training_step.loss"]


def test_a_value_is_logged_where_it_is_and_moved_where_it_is_not(monkeypatch):
    moves = []
    monkeypatch.setattr(
        "lightning_modules.parts.logging._move", lambda metric, *to: moves.append(to) or metric
    )
    results = _ResultCollection(training=True)
    for value in (1.0, 2.0):
        metric = logged(results, torch.tensor(value), on_step=True, on_epoch=False, batch_size=1)
    assert metric.value.item() == 2
    assert moves == []
    metric.to(torch.device("meta"))
    assert moves == [(torch.device("meta"),)]


def test_means_over_an_epoch_and_a_move_are_right():
    results = _ResultCollection(training=True)
    for value, size in ((1.0, 1), (4.0, 2)):
        metric = logged(results, torch.tensor(value), on_step=False, on_epoch=True, batch_size=size)
    assert metric.compute().item() == pytest.approx(3)
    assert metric.to(torch.device("meta")).value.device.type == "meta"
    assert metric.cumulated_batch_size.device.type == "meta"
