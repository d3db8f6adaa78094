import csv

import pytest
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn

from callbacks.distillation.cka import linear_cka
from callbacks.measure.cka import CKAAnalysis, block_paths
from lightning_modules.base import Method
from lightning_modules.classification import ImageClassifier

VIT = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 16, "num_heads": 2}
RESNET = {"stem_width": 8, "channels": (8, 16, 24, 32)}


@pytest.fixture
def module() -> ImageClassifier:
    return ImageClassifier("vit_tiny_patch16_224", 4, model_args=VIT)


def read(path) -> tuple[list[str], dict[str, list[float]]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return header[1:], {row[0]: [float(value) for value in row[1:]] for row in rows}


def test_two_networks_are_compared_layer_by_layer(module, trainer, blob_data, tmp_path):
    other = timm.create_model("resnet10t", num_classes=7, **RESNET)
    callbacks = [
        CKAAnalysis(other, layers=["blocks.*.mlp"], other_layers=["layer?"], name="cross"),
        CKAAnalysis(module.network.__class__(num_classes=4, **VIT), name="self"),
    ]
    callbacks[1].network.load_state_dict(module.network.state_dict())
    data = blob_data(length=22, batch_size=10)  # the last batch of 2 is left out
    run = trainer(callbacks=callbacks)
    run.validate(module, datamodule=data, verbose=False)
    columns, rows = read(tmp_path / "cross.csv")
    assert columns == ["layer1", "layer2", "layer3", "layer4"]
    assert list(rows) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    columns, rows = read(tmp_path / "self.csv")
    assert columns == list(rows) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [rows[f"blocks.{i}"][i] for i in range(3)] == pytest.approx([1, 1, 1], abs=1e-5)
    for name in ("cross", "self"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200
    results = callbacks[1].results(run, module)
    assert results["samples"] == 20
    assert results["largest"] == pytest.approx(1.0, abs=1e-5)
    assert not any(m._forward_hooks for m in module.network.modules())


def test_one_batch_gives_the_debiased_similarity_of_its_features(module, trainer, blob_data, tmp_path):
    other = timm.create_model("resnet10t", num_classes=4, **RESNET)
    callback = CKAAnalysis(other, layers=["blocks.2"], other_layers=["layer4"], max_batches=1)
    trainer(callbacks=[callback]).validate(
        module, datamodule=blob_data(length=32, batch_size=16), verbose=False
    )
    images = torch.stack([blob_data().blobs[i]["image"] for i in range(16)])
    mean, std = (torch.tensor(other.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        module.eval()
        own = module.network.forward_intermediates(
            module.normalize(images), indices=[2], return_prefix_tokens=True, output_fmt="NLC", norm=False
        )[1][0]
        x = torch.cat([own[1], own[0]], dim=1).flatten(1)
        y = other.eval().forward_intermediates((images - mean) / std, indices=[4])[1][0].flatten(1)
    _, rows = read(tmp_path / "cka.csv")
    wanted = linear_cka(x.double(), y.double(), debiased=True).item()
    assert rows["blocks.2"][0] == pytest.approx(wanted, abs=1e-4)
    assert callback.results(None, module)["samples"] == 16


def test_a_training_run_is_left_alone(module, trainer, blob_data, tmp_path):
    callback = CKAAnalysis(timm.create_model("resnet10t", num_classes=4, **RESNET))
    run = trainer(callbacks=[callback], max_steps=1)
    run.fit(module, datamodule=blob_data(length=8))
    assert not (tmp_path / "cka.csv").exists()
    assert callback.results(run, module) == {}


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("resnet18", "layer1.0", 8),
        ("mobilenetv2_100", "blocks.0.0", 17),
        ("convnext_tiny", "stages.0.blocks.0", 18),
        ("deit_tiny_patch16_224", "blocks.0", 12),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0", 12),
        ("mixer_b16_224", "blocks.0", 12),
    ],
)
def test_blocks_of_every_family(name, first, count):
    with torch.device("meta"):
        paths = block_paths(timm.create_model(name))
    assert (paths[0], len(paths)) == (first, count)


def test_errors(module, trainer, blob_data, recwarn):
    with pytest.raises(ValueError, match="no sequence of blocks"):
        block_paths(nn.Linear(2, 2))
    other = timm.create_model("resnet10t", num_classes=4, **RESNET)
    run = trainer(callbacks=[CKAAnalysis(other, other_layers=["layer9"])])
    with pytest.raises(ValueError, match="layer9"):
        run.validate(module, datamodule=blob_data(), verbose=False)
    assert not any(m._forward_hooks for m in module.network.modules())

    class Plain(Method):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(MisconfigurationException, match="no `network`"):
        trainer(callbacks=[CKAAnalysis(other)]).validate(Plain(), datamodule=blob_data(), verbose=False)
    tiny = blob_data(length=3, batch_size=3)
    trainer(callbacks=[CKAAnalysis(other)]).validate(module, datamodule=tiny, verbose=False)
    assert any("no batch of at least 4" in str(warning.message) for warning in recwarn)
