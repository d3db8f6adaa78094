"""HessianPTQ through the Trainer: classifiers, files of steps, refusals, integers."""

import copy
import json

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from callbacks import HessianPTQ
from callbacks.quantization.scheme import VisionScheme
from callbacks.quantization.vision.layers import QuantizedLayer, QuantizedProduct
from callbacks.quantization.vision.observe import observe
from callbacks.quantization.vision.operands import GELUOperand, UniformOperand
from callbacks.quantization.vision.report import effective_macs
from callbacks.quantization.vision.structure import Structure
from lightning_modules import ImageClassifier

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


class Data(LightningDataModule):
    def __init__(self, size=16, training=True):
        super().__init__()
        images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.samples = [{"image": x, "label": i % 4, "index": i} for i, x in enumerate(images)]
        if training:
            self.calibration_batches = lambda count: [{"image": images[:count]}]

    def test_dataloader(self):
        return DataLoader(self.samples, batch_size=4)

    predict_dataloader = test_dataloader


def classifier(name="vit_tiny_patch16_224", **model):
    torch.manual_seed(0)
    return ImageClassifier(name, 4, model_args=model or VIT).eval()


def trainer(folder, callback):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )


def logits(outputs):
    return torch.cat([batch["probabilities"] for batch in outputs])


def options(**changed):
    return {"calibration_images": 4, "candidates": 20, "rounds": 1, **changed}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Folder of a run whose `test` has calibrated, and the module that it left behind."""
    folder = tmp_path_factory.mktemp("run")
    module = classifier()
    trainer(folder, HessianPTQ(**options())).test(module, datamodule=Data(), verbose=False)
    return folder, module


def test_predict_takes_the_steps_and_says_the_same(calibrated):
    folder, module = calibrated
    images = torch.stack([sample["image"] for sample in Data().samples])
    wanted = module.eval()(images).softmax(1)
    found = trainer(folder, HessianPTQ(**options())).predict(classifier(), datamodule=Data(training=False))
    assert torch.equal(logits(found), wanted)
    assert not torch.equal(wanted, classifier()(images).softmax(1))


def test_state_dict_restores_without_calibration(calibrated):
    _, module = calibrated
    state = module.network.state_dict()
    assert state["blocks.0.attn.products.0.left.step"].shape == (1, 2, 1, 1)
    other = copy.deepcopy(module.network)
    for part in other.modules():
        if hasattr(part, "step") and isinstance(part.step, torch.Tensor):
            part.step = torch.zeros(0)
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match="is not calibrated"):
        other(x)
    other.load_state_dict(state)
    assert torch.equal(other(x), module.network(x))


def test_what_is_quantized_and_reported(calibrated):
    folder, module = calibrated
    report = json.loads((folder / "ptq_report.json").read_text())
    assert report["scheme"] == "W8A8"
    assert set(report["layers"]) >= {
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.products.1",
        "head",
    }
    assert isinstance(module.network.blocks[0].mlp.fc2.input_operand, GELUOperand)
    assert module.network.blocks[0].attn.qkv.weight_operand.step.shape == (48, 1)  # three row groups
    assert isinstance(module.network.blocks[0].attn, timm.layers.attention.Attention)


def test_predict_without_steps_or_training_images_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"has no steps in .*no training images"):
        trainer(tmp_path, HessianPTQ(**options())).predict(classifier(), datamodule=Data(training=False))


def test_steps_of_other_weights_or_options_are_refused(calibrated):
    folder, _ = calibrated
    module = classifier()
    nn.init.ones_(module.network.head.weight)
    with pytest.raises(MisconfigurationException, match=r"other settings.*weights"):
        trainer(folder, HessianPTQ(**options())).predict(module, datamodule=Data())
    with pytest.raises(MisconfigurationException, match=r"other settings.*options"):
        trainer(folder, HessianPTQ(**options(bits=4))).predict(classifier(), datamodule=Data())


def test_damaged_steps_are_refused(tmp_path):
    (tmp_path / "ptq_steps.pt").write_bytes(b"nothing")
    with pytest.raises(MisconfigurationException, match="damaged, or no steps"):
        trainer(tmp_path, HessianPTQ(**options())).predict(classifier(), datamodule=Data())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"activation_bits": 1}, "activation_bits=1"),
        ({"rounds": 0}, "rounds"),
        ({"search": "guess"}, "search=guess"),
        ({"theta_low": 2.0}, "theta_high"),
        ({"export": "onnx", "bits": 6}, "export: onnx writes integers of 8 bits"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        HessianPTQ(**wrong)


def test_a_pattern_that_matches_nothing_names_itself(tmp_path):
    with pytest.raises(MisconfigurationException, match="ignore"):
        trainer(tmp_path, HessianPTQ(**options(ignore=["nothing.*"]))).test(classifier(), datamodule=Data())


def test_an_operand_without_a_step_refuses():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="is not calibrated"):
        QuantizedLayer(layer, VisionScheme(), False, False, 1).input(torch.ones(1, 2))


def test_the_search_beats_minmax_and_sequential_runs(tmp_path):
    images = torch.stack([sample["image"] for sample in Data().samples])
    full, errors = classifier()(images), {}
    for name, changed in {
        "minmax": {"search": "minmax"},
        "grid": {},
        "sequential": {"grad_source": "sequential_kl"},
    }.items():
        module = classifier()
        callback = HessianPTQ(**options(bits=4, activation_bits=4, candidates=60, **changed))
        trainer(tmp_path / name, callback).test(module, datamodule=Data(), verbose=False)
        errors[name] = float((module.eval()(images) - full).square().mean())
    assert errors["grid"] < errors["minmax"]
    assert errors["sequential"] not in (errors["grid"], errors["minmax"])  # gradients of its own


def test_batch_norms_are_folded_and_products_found_in_place():
    torch.manual_seed(0)
    for name, folds, products in (("resnet18", 20, 0), ("tiny_vit_5m_224", 27, 10)):
        network = timm.create_model(name, num_classes=4).eval()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.1, 0.1)
                part.running_var.uniform_(0.5, 1.5)
        x = torch.rand(1, 3, 64, 64) if not products else torch.rand(1, 3, 224, 224)
        with torch.no_grad():
            wanted = network(x)
            structure = Structure.of(observe(network, lambda network=network, x=x: network(x)))
            structure.apply(network)
            torch.testing.assert_close(network(x), wanted, rtol=1e-3, atol=1e-4)
        assert len(structure.folds) == folds
        assert len(structure.products) == products


def test_integers_in_onnxruntime(tmp_path):
    module = classifier()
    callback = HessianPTQ(**options(export="onnx", search="minmax"))
    trainer(tmp_path, callback).test(module, datamodule=Data(), verbose=False)
    report = callback.report["onnx"]
    assert (tmp_path / "ptq_int8.onnx").stat().st_size == report["bytes"]
    # four linear layers, one of two ranges; a product of logits, two of the two ranges of probabilities
    assert report["integer_operators"] == {"MatMulIntegerToFloat": 8}
    assert report["float_operators"] == {"Conv": 1, "Gemm": 1}  # patches and head
    assert report["max_abs_difference"] < 1e-2
    assert report["speedup"] == pytest.approx(report["float_milliseconds"] / report["milliseconds"])
    assert not (tmp_path / ".ptq_float.onnx").exists()


def test_cost_accounting_of_the_paper():
    assert effective_macs(42.0, 28.97, 8) == pytest.approx(20.28, abs=0.01)
    assert effective_macs(42.0, 28.97, 6) == pytest.approx(18.45, abs=0.02)


def test_both_operands_of_a_product_are_quantized(calibrated):
    _, module = calibrated
    first, second = module.network.blocks[0].attn.products
    assert isinstance(first.left, UniformOperand)
    assert second.after_softmax
    assert second.left.calibrated
    assert QuantizedProduct(second, 8, "disjoint", torch.device("cpu")).right.calibrated is False
