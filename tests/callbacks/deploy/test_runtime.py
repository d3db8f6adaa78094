import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.deploy.runtime import RuntimeNetwork, RuntimeTest, session_of
from callbacks.run.results import Results
from lightning_modules import ImageClassifier
from tests.conftest import BlobData

pytest.importorskip("onnxscript")


class Calibrated(BlobData):
    def calibration_batches(self, count):
        return [{"image": torch.stack([self.blobs[index]["image"] for index in range(count)])}]


def small():
    return ImageClassifier("resnet10t", num_classes=4, model_args={"channels": (8, 8, 16, 16)})


def test_int8_is_tested_in_its_own_file(trainer, tmp_path):
    module, data = small(), Calibrated()
    network = module.network
    run = trainer(callbacks=[Results(), RuntimeTest("int8", calibration_images=8, repeats=2)])
    (metrics,) = run.test(module, data, verbose=False)
    assert module.network is network
    assert "normalize" not in vars(module)  # everything is as it was
    report = json.loads((tmp_path / "results.json").read_text())["onnxruntime"]
    assert report["bytes_on_disk"] == (tmp_path / "model_int8.onnx").stat().st_size < report["float32_bytes"]
    assert report["calibration_images"] == 8
    assert report["latency_seconds"] > 0 < report["float32_latency_seconds"]
    assert sum(report["integer_operators"].values()) > 10
    assert not report["float_operators"]
    session = session_of(tmp_path / "model_int8.onnx")
    images = torch.stack([data.blobs[index]["image"] for index in range(len(data.blobs))])
    labels = torch.tensor([int(data.blobs[index]["label"]) for index in range(len(data.blobs))])
    (logits,) = session.run(None, {"image": images.numpy()})
    assert metrics["test/top1"] == pytest.approx(float((logits.argmax(1) == labels.numpy()).mean()))
    with torch.no_grad():
        full = module.eval()(images)
    assert 0 < (full - torch.from_numpy(logits)).abs().max() < 0.2 * full.abs().max() + 0.1


def test_float32_is_tested_in_onnxruntime(trainer, tmp_path, monkeypatch):
    module = small()
    run = trainer(callbacks=[Results(), RuntimeTest(repeats=2)])
    said = torch.eye(4)[2]
    monkeypatch.setattr(RuntimeNetwork, "forward", lambda self, images: said.expand(len(images), 4))
    (metrics,) = run.test(module, Calibrated(), verbose=False)
    assert metrics["test/top1"] == 0.25
    report = json.loads((tmp_path / "results.json").read_text())["onnxruntime"]
    assert report["bytes_on_disk"] == (tmp_path / "model.onnx").stat().st_size
    assert not (tmp_path / "model_int8.onnx").exists()


def test_data_without_training_images_are_refused(trainer, blob_data):
    with pytest.raises(MisconfigurationException, match="RuntimeTest: this run's data have no"):
        trainer(callbacks=[RuntimeTest()]).test(small(), blob_data(), verbose=False)
