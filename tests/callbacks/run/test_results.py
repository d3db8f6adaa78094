import json
import os
from datetime import datetime

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from callbacks.run.directory import replaced_atomically, run_directory, write_json
from callbacks.run.results import ReportsResults, Results, flatten, human, plain
from lightning_modules import ImageClassifier


class Reporter(Callback):
    def __init__(self, values, name=None):
        self.values = values
        if name:
            self.name = name

    def results(self, trainer, module):
        return self.values


class LateReporter(Callback):
    """Knows its numbers only at the very end of the stage."""

    done = False

    def on_test_end(self, trainer, pl_module):
        self.done = True

    def results(self, trainer, module):
        return {"done": self.done}


def classifier():
    return ImageClassifier("test_resnet", num_classes=4)


def read(path):
    return json.loads(path.read_text())


def test_writes_metrics_and_the_part_of_every_callback(trainer, blob_data, tmp_path, capsys):
    reporters = [Reporter({"macs": 1_814_073_344, "layers": {"a": 0.5}}, "efficiency"), Reporter({"x": 1})]
    run = trainer(callbacks=[Results(), *reporters])
    metrics = run.test(classifier(), blob_data(), verbose=False)[0]
    report = read(tmp_path / "results.json")
    assert report["stage"] == "test"
    assert report["metrics"] == pytest.approx(metrics)
    assert report["efficiency"] == {"macs": 1_814_073_344, "layers": {"a": 0.5}}
    assert report["reporter"] == {"x": 1}
    assert report["device"]["type"] == "cpu"
    assert report["device"]["name"]
    assert report["device"]["count"] == 1
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["checkpoint"] is None
    assert report["seed"] == 0
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    table = capsys.readouterr().out
    for text in ("test/top1", "efficiency/macs", "1.81 G", "efficiency/layers/a", "results.json"):
        assert text in table


def test_names_the_checkpoint_that_was_tested(trainer, blob_data, tmp_path):
    run = trainer(callbacks=[Results()])
    module = classifier()
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    trainer(callbacks=[Results()]).test(module, blob_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert read(tmp_path / "results.json")["checkpoint"] == str(tmp_path / "a.ckpt")


def test_hears_callbacks_that_were_added_behind_it(trainer, blob_data, tmp_path):
    trainer(callbacks=[Results(), LateReporter()]).test(classifier(), blob_data(), verbose=False)
    assert read(tmp_path / "results.json")["late_reporter"] == {"done": True}


def test_validate_has_its_own_file_and_fit_has_none(trainer, blob_data, tmp_path):
    run = trainer(callbacks=[Results(), Reporter({"x": 1})], limit_train_batches=1)
    run.fit(classifier(), blob_data())
    assert not list(tmp_path.glob("*.json"))
    run.validate(classifier(), blob_data(), verbose=False)
    assert read(tmp_path / "results_validate.json")["stage"] == "validate"
    assert not (tmp_path / "results.json").exists()


def test_two_callbacks_of_one_name_keep_apart(trainer, blob_data, tmp_path):
    callbacks = [Results(), Reporter({"x": 1}), Reporter({"x": 2}), Reporter({}), Reporter({"x": 3})]
    trainer(callbacks=callbacks).test(classifier(), blob_data(), verbose=False)
    report = read(tmp_path / "results.json")
    assert [report[key]["x"] for key in ("reporter", "reporter_2", "reporter_3")] == [1, 2, 3]


def test_a_tensor_is_refused_by_callback_and_key(trainer, blob_data, tmp_path):
    run = trainer(callbacks=[Results(), Reporter({"layers": {"a": [torch.ones(2)]}})])
    with pytest.raises(TypeError, match="Reporter reports 'layers/a/0' as a Tensor"):
        run.test(classifier(), blob_data(), verbose=False)
    assert not (tmp_path / "results.json").exists()


def test_a_reserved_name_is_refused(trainer, blob_data):
    run = trainer(callbacks=[Results(), Reporter({"x": 1}, name="metrics")])
    with pytest.raises(MisconfigurationException, match="under the name 'metrics'"):
        run.test(classifier(), blob_data(), verbose=False)


def test_results_that_are_no_dictionary_are_refused(trainer, blob_data):
    with pytest.raises(TypeError, match=r"Reporter.results\(\) must return a dictionary, not list"):
        trainer(callbacks=[Results(), Reporter([1])]).test(classifier(), blob_data(), verbose=False)


def test_an_ordinary_callback_reports_nothing():
    assert not isinstance(Results(), ReportsResults)
    assert isinstance(Reporter({}), ReportsResults)


def test_run_directory_is_made_and_must_be_local(trainer, tmp_path):
    assert run_directory(trainer(default_root_dir=tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(MisconfigurationException, match="need a local directory"):
        run_directory(trainer(default_root_dir="memory://bucket/run"))


def test_plain_values():
    value = {"a": (1, 2.5, True, None, "x"), "b": {"c": float("nan"), "d": float("-inf")}}
    assert plain(value, "X") == {"a": [1, 2.5, True, None, "x"], "b": {"c": None, "d": None}}
    with pytest.raises(TypeError, match="X: 'a' has the key 3; keys of a report are strings"):
        plain({"a": {3: 1}}, "X")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})

    def fail():
        with replaced_atomically(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert read(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("macs", 1_814_073_344, "1.81 G"),
        ("parameters", 11_689_512, "11.7 M"),
        ("parameters", 999_999, "1 M"),
        ("latency_seconds", 0.0032, "3.2 ms"),
        ("latency_seconds", 12.34, "12.3 s"),
        ("latency_seconds", 4.5e-5, "45 us"),
        ("images_per_second", 1409.3, "1.41 k/s"),
        ("images_per_second", 86.27, "86.3 /s"),
        ("bytes_on_disk", 46_836_043, "46.8 MB"),
        ("packed_bytes", 512, "512 B"),
        ("efficiency/threads", 2, "2"),
        ("epochs", 3000, "3000"),
        ("test/top1", 0.71251, "0.7125"),
        ("kept", True, "yes"),
        ("nothing", None, "-"),
        ("input", "1x3x32x32", "1x3x32x32"),
        ("tokens", [197, 147, 97], "197, 147, 97"),
        ("tokens", list(range(12)), "12 values"),
    ],
)
def test_human_units(key, value, text):
    assert human(key, value) == text


def test_flatten_joins_names():
    assert dict(flatten({"a": {"b": {"c": 1}}, "d": [2]}, "x")) == {"x/a/b/c": 1, "x/d": [2]}


@pytest.mark.timeout(60)
def test_two_processes_ask_every_rank_and_write_once(trainer, blob_data, tmp_path):
    class Rank(Callback):
        def results(self, trainer, module):
            return {"ranks": int(trainer.strategy.reduce(torch.tensor(1), reduce_op="sum"))}

    run = trainer(callbacks=[Results(), Rank()], strategy="ddp_fork", devices=2)
    run.test(classifier(), blob_data(length=16), verbose=False)
    report = read(tmp_path / "results.json")
    assert report["rank"] == {"ranks": 2}  # hangs where only one rank is asked
    assert report["device"]["count"] == 2
