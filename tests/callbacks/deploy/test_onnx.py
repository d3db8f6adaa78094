import importlib.util
import json
import os

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

import callbacks.deploy.onnx as onnx_module
from callbacks.deploy.onnx import ONNXExport, export_onnx, max_abs_difference, tensors_in
from callbacks.run.results import Results
from lightning_modules import CausalLanguageModel, ImageClassifier
from lightning_modules.parts.inference import InferencePath, InferenceSpec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        pooled = [nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *pooled, nn.Linear(4, 2))
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

    def normalize(self, images):
        return (images - self.mean) / 0.25

    def training_step(self, batch, batch_idx):
        return self.network(self.normalize(batch["image"])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("mean", self.network(self.normalize(batch["image"])).mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_pruned_classifier_after_test(trainer, blob_data, tmp_path):
    module = ImageClassifier("test_resnet", num_classes=4)
    pruned = dict(module.network.named_parameters())["fc.weight"]
    with torch.no_grad():
        pruned[:, ::2] = 0
    run = trainer(callbacks=[Results(), ONNXExport()])
    run.test(module, blob_data(), verbose=False)
    report = json.loads((tmp_path / "results.json").read_text())["onnx"]
    path = tmp_path / "model.onnx"
    assert report["path"] == str(path)
    assert report["bytes"] == path.stat().st_size
    assert 0 <= report["max_abs_difference"] <= 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "results.json"]

    images = torch.rand(5, 3, 32, 32)  # another batch size than any that was tried
    (logits,) = session(path).run(None, {"image": images.numpy()})
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), module(images), atol=1e-5, rtol=1e-4)

    assert names_of(path) == [("image", ["batch", 3, 32, 32]), ("logits", ["batch", 4])]
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["class_names"]) == [f"corner {index}" for index in range(4)]
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    weights = [torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer]
    (head,) = [w if w.shape == pruned.shape else w.T for w in weights if set(w.shape) == set(pruned.shape)]
    assert torch.equal(head == 0, pruned == 0)


def test_after_fit_with_the_size_of_validation(trainer, blob_data, tmp_path):
    module = Tiny()
    outputs = {}
    hook = module.network[0].register_forward_hook(lambda *args: outputs.update(tap=args[2]))
    run = trainer(callbacks=[ONNXExport(when="fit", file_name="student.onnx")], limit_train_batches=1)
    run.fit(module, blob_data(size=24).train_dataloader(), blob_data(size=16).val_dataloader())
    hook.remove()
    images = torch.rand(1, 3, 16, 16)
    (logits,) = session(tmp_path / "student.onnx").run(None, {"image": images.numpy()})
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), InferencePath(module)(images))


def test_a_difference_above_the_tolerance_writes_nothing(trainer, blob_data, tmp_path):
    (tmp_path / "model.onnx").write_text("old")
    run = trainer(callbacks=[ONNXExport(tolerance=-1.0)])
    with pytest.raises(RuntimeError, match=r"differ from torch's by up to .* more than tolerance -1"):
        run.test(Tiny(), blob_data(), verbose=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def test_a_wrong_graph_is_found(tmp_path):
    images = (torch.rand(2, 3, 8, 8),)
    right, wrong = InferencePath(Tiny()).eval(), InferencePath(Tiny()).eval()
    with torch.no_grad():
        export_onnx(wrong, images, tmp_path / "wrong.onnx")
        assert max_abs_difference(right, tmp_path / "wrong.onnx", [images]) > 1e-3
        assert max_abs_difference(wrong, tmp_path / "wrong.onnx", [images]) < 1e-5
        right.network[5].bias.fill_(float("nan"))
        assert max_abs_difference(right, tmp_path / "wrong.onnx", [images]) == float("inf")
        assert max_abs_difference(nn.Flatten(), tmp_path / "wrong.onnx", [images]) == float("inf")


def test_what_cannot_be_exported_says_so(tmp_path):
    class Branches(nn.Module):
        def forward(self, images):
            return images + 1 if images.sum() > 0 else images.nonzero()

    with pytest.raises(RuntimeError, match=r"torch.onnx cannot export Branches"):
        export_onnx(Branches(), (torch.rand(2, 3, 4, 4),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"network has torch.bfloat16: .*precision=32-true"):
        export_onnx(nn.Linear(2, 2).bfloat16(), (torch.rand(2, 2),), tmp_path / "model.onnx")


def test_a_missing_extra_is_named_before_the_run(trainer, blob_data, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a)
    )
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime: pip install featherlight\[export\]"):
        trainer(callbacks=[ONNXExport()]).test(Tiny(), blob_data(), verbose=False)


def test_an_unknown_batch_is_an_error(trainer):
    loader = torch.utils.data.DataLoader(torch.ones(4, 3))
    with pytest.raises(MisconfigurationException, match="ONNXExport finds no `image`"):
        trainer(callbacks=[ONNXExport()]).test(Tiny(), loader, verbose=False)


@pytest.mark.parametrize("name", ["model.pt", "a/model.onnx", "../model.onnx"])
def test_a_bad_file_name_is_refused(name):
    with pytest.raises(ValueError, match="file_name"):
        ONNXExport(file_name=name)


def names_of(path):
    graph = onnx.load(path).graph
    return [
        (node.name, [size.dim_param or size.dim_value for size in node.type.tensor_type.shape.dim])
        for node in (*graph.input, *graph.output)
    ]


def test_a_language_model_is_exported_by_name_with_a_free_length(trainer, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    module = CausalLanguageModel("opt", {**small, "word_embed_proj_dim": 16}, tokenizer="bytes")
    ids = torch.randint(0, 200, (4, 12))
    segments = [{"input_ids": row, "index": number} for number, row in enumerate(ids)]
    trainer(callbacks=[ONNXExport()]).test(module, DataLoader(segments, batch_size=2), verbose=False)
    path = tmp_path / "model.onnx"
    assert names_of(path) == [
        ("input_ids", ["batch", "length"]),
        ("logits", ["batch", "length", module.network.config.vocab_size]),
    ]
    longer = torch.randint(0, 200, (3, 17))
    (logits,) = session(path).run(["logits"], {"input_ids": longer.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), module.eval()(longer), atol=1e-5, rtol=1e-4)


def test_a_size_that_is_declared_free_and_is_not_is_found(tmp_path):
    class Halves(nn.Module):
        def forward(self, *inputs):
            return inputs[0][:, :4] + inputs[0][:, 4:8]

    spec = InferenceSpec(outputs=("sums",), free_dimensions={"x": {1: "width"}})
    with pytest.raises(RuntimeError, match=r"Halves declares a size free, and fails on inputs of 2x4"):
        export_onnx(Halves(), {"x": torch.rand(2, 8)}, tmp_path / "model.onnx", spec=spec)
    assert not list(tmp_path.iterdir())
    export_onnx(Halves(), {"x": torch.rand(2, 8)}, tmp_path / "x.onnx", spec=InferenceSpec(outputs=("sums",)))
    assert names_of(tmp_path / "x.onnx") == [("x", ["batch", 8]), ("sums", ["batch", 4])]


def test_several_inputs_and_outputs(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, *inputs):
            left, right = inputs
            return {"sum": self.mix(left + right), "parts": (left * 2, right)}

    inputs = torch.rand(2, 4), torch.rand(2, 4)
    assert len(list(tensors_in(Both()(*inputs)))) == 3
    with torch.no_grad():
        assert export_onnx(Both(), inputs, tmp_path / "both.onnx")["max_abs_difference"] < 1e-5
    assert [name for name, _ in names_of(tmp_path / "both.onnx")] == [
        *("input_0", "input_1", "sum", "parts_0", "parts_1")
    ]


def test_a_graph_and_the_weights_beside_it_are_one_at_any_moment(tmp_path, monkeypatch):
    """The graph is replaced last; until then the older one refers to older weights, which are still there."""
    monkeypatch.setattr(onnx_module, "PROTOBUF_LIMIT", 0)
    path, images = tmp_path / "model.onnx", torch.rand(2, 3, 4, 4)
    networks = [nn.Conv2d(3, 64, 3).eval() for _ in range(2)]
    (tmp_path / "model-notes.onnx.data").write_text("of somebody else")
    export_onnx(networks[0], (images,), path)
    replace, seen = os.replace, []

    def replacing(source, target):
        seen.append(max_abs_difference(networks[0], path, [(images,)]) < 1e-5)
        replace(source, target)

    monkeypatch.setattr(onnx_module.os, "replace", replacing)
    export_onnx(networks[1], (images,), path)
    assert len(seen) >= 2
    assert all(seen)
    assert max_abs_difference(networks[1], path, [(images,)]) < 1e-5
    assert len(list(tmp_path.iterdir())) == 3
