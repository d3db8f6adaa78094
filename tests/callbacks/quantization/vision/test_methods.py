"""HessianPTQ on real methods: convolutions, detectors, segmenters, pruned networks, two processes."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from callbacks import HessianPTQ, TokenPruningPooling
from callbacks.quantization.vision.layers import QuantizedLayer
from callbacks.quantization.vision.products import ProductMode
from datamodules import CocoDataModule, SA1BDataModule
from datamodules.coco import DecoTransforms
from datamodules.samples.sa1b import write_sa1b
from lightning_modules import DecoDetector, GenDet, ImageClassifier, TinySAMModule
from lightning_modules.deco import Deco
from lightning_modules.tinysam import Protocol
from lightning_modules.tinysam.calibration import calibration_boxes, calibration_clicks, calibration_points
from tests.conftest import BlobData
from tests.lightning_modules.gendet.conftest import Stub, ToyData
from tests.lightning_modules.tinysam.tiny import tiny_sam

SMALL = {"calibration_images": 2, "candidates": 6, "rounds": 1}


class Calibrating(BlobData):
    """Blobs that can be calibrated with."""

    def calibration_batches(self, count):
        return [{"image": torch.stack([self.blobs[index]["image"] for index in range(count)])}]


def run(folder, *callbacks, **options):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**defaults, **quiet, **options}, default_root_dir=folder, callbacks=list(callbacks))


def same_from_steps(folder, make, data):
    """Test calibrates; another run on the same weights takes its steps. Returns the first's callback."""
    first, second, modules = HessianPTQ(**SMALL), HessianPTQ(**SMALL), (make(), make())
    scores = [
        run(folder, callback).test(module, datamodule=data(), verbose=False)
        for callback, module in zip((first, second), modules, strict=True)
    ]
    assert scores[0] == scores[1]
    states = [module.state_dict() for module in modules]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    full = make().state_dict()
    changed = [name for name in full if name in states[0] and not torch.equal(full[name], states[0][name])]
    assert changed, "nothing was quantized"
    return first


def resnet():
    torch.manual_seed(0)
    return ImageClassifier("resnet10t", 4, model_args={"stem_width": 8, "channels": (8, 8, 16, 16)})


def test_a_convolutional_network(tmp_path):
    callback = same_from_steps(tmp_path, resnet, lambda: Calibrating(length=8, size=32))
    assert callback.report["folded_batch_norms"] >= 10
    assert callback.report["full_precision"] == []


def test_a_detector(tmp_path):
    def make():
        torch.manual_seed(0)
        sizes = {"encoder_widths": [8, 8, 16], "encoder_depths": [1, 1, 1], "decoder_layers": 1}
        return DecoDetector(
            Deco(num_classes=6, backbone="small", num_queries=9, grid_height=3, hidden_dim=16, **sizes)
        )

    def data():
        transforms = DecoTransforms(short_side=32, max_size=48, train_sides=[32], crop_probability=0.0)
        options = {"sample": True, "sample_size": 6, "sample_image_size": 48, "contiguous_labels": True}
        return CocoDataModule(
            root=tmp_path / "coco", transforms=transforms, batch_size=2, num_workers=0, **options
        )

    callback = same_from_steps(tmp_path / "run", make, data)
    assert any("decoder" in name for name in callback.units)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("ptq") / "scenes"
    write_sa1b(root, size=8, image_size=48)
    return root


def sam_data(root):
    return SA1BDataModule(
        root=root, image_size=64, masks_per_image=3, val_fraction=0.3, batch_size=2, num_workers=0
    )


def test_encoder_and_decoder_of_a_segmenter(tmp_path, scenes):
    def make():
        torch.manual_seed(1)
        return TinySAMModule(tiny_sam(8), protocol=Protocol(clicks=1))

    callback = same_from_steps(tmp_path, make, lambda: sam_data(scenes))
    names = list(callback.units)
    for part in (
        "image_encoder.layers.1.blocks.0.attn.products.1",
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.products.0",
        "mask_decoder.output_upscaling.0",
        "mask_decoder.iou_prediction_head.layers.2",
    ):
        assert part in names
    assert not [name for name in names if name.endswith("products.2")], "each call of a module has its own"
    attention = "image_encoder.layers.1.blocks.0.attn."
    order = [names.index(attention + part) for part in ("qkv", "products.0", "products.1", "proj")]
    assert order == sorted(order), "not in the order of the computation"


def test_calibration_points_lie_on_masks(scenes):
    data = sam_data(scenes)
    batch = data.calibration_batches(2)[0]
    points, owner = calibration_points(batch, 5)
    assert owner.tolist() == [place for place in range(len(batch["image"])) for _ in range(5)]
    for (x, y), place in zip(points[:, 0].tolist(), owner.tolist(), strict=True):
        scale = float(batch["orig_size"][place][0]) / float(batch["size"][place][0])
        row, column = (int((value + 0.5) * scale) for value in (y, x))
        assert any(bool(mask[row, column]) for mask in batch["truth"][place])
    assert torch.equal(points, calibration_points(batch, 5)[0])


def test_calibration_prompts_of_all_kinds():
    """A click beside a mask, and boxes around it: in the frame's pixels, as a person would give them."""
    batch = {"size": torch.tensor([[32, 64]]), "orig_size": torch.tensor([[16, 32]])}
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[4:8, 10:20] = True
    batch["truth"] = [mask[None]]
    clicks, owner = calibration_clicks(batch, 6)
    assert owner.tolist() == [0] * 6
    cells = ((clicks + 0.5) / 2 - 0.5).long()  # x, y
    assert [[bool(mask[y, x]) for x, y in prompt] for prompt in cells.tolist()] == [[True, False, True]] * 6
    boxes, _ = calibration_boxes(batch, 2)
    assert boxes.tolist() == [[19.5, 7.5, 39.5, 15.5]] * 2
    batch["truth"] = [torch.zeros(0, 16, 32)]
    anywhere = calibration_boxes(batch, 9)[0]
    assert (anywhere[:, :2] < anywhere[:, 2:]).all()
    assert (anywhere >= -1).all()
    assert (anywhere <= torch.tensor([64, 32, 64, 32])).all()


def test_a_detector_of_generated_images_on_cached_features(tmp_path):
    """Each of its logits is a yes or no of its own, not a class among those of the batch."""

    def make():
        torch.manual_seed(0)
        module = GenDet(Stub(48), dim=16, heads=2)
        module.stage_steps.fill_(1)
        return module

    assert make().inference.kinds == {"logits": "bernoulli"}
    callback = same_from_steps(tmp_path, make, lambda: ToyData(count=8))
    assert callback.report["full_precision"] == []
    assert {"embed", "teacher.attn.qkv", "student.mlp.fc2", "classifier.fc"} <= set(callback.units)


class Encoder(nn.Module):
    """A layer of torch's own transformer over patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_torchs_own_attention_stays_in_full_precision_and_what_is_around_it_does_not(tmp_path):
    module = resnet()
    module.network = Encoder()
    full = copy.deepcopy(module).eval()
    callback = HessianPTQ(**{**SMALL, "bits": 4, "activation_bits": 4})
    with pytest.warns(UserWarning, match="projections of nn.MultiheadAttention stay .* in layer.self_attn"):
        run(tmp_path, callback).test(module, datamodule=Calibrating(length=8), verbose=False)
    assert list(callback.units) == ["patches", "layer.linear1", "layer.linear2", "head"]
    assert callback.report["full_precision"] == ["layer.self_attn"]
    for name, value in full.network.layer.self_attn.state_dict().items():
        assert torch.equal(value, module.network.layer.self_attn.state_dict()[name])
    seen = []
    module.network.layer.linear1.input_operand.register_forward_hook(lambda *_: seen.append(True))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # where torch would fuse the layer
        difference = (module.eval()(images) - full(images)).abs().max()
    assert seen
    assert 0 < difference < 1


def test_attention_of_a_network_that_removes_tokens(tmp_path):
    """Its blocks compute similarities of their own, which are no attention, in a number that varies."""
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    states, answers = [], []
    for callbacks in (
        (HessianPTQ(**SMALL), TokenPruningPooling([0], r=4)),
        (TokenPruningPooling([0], r=4), HessianPTQ(**SMALL)),
    ):
        torch.manual_seed(0)
        module = ImageClassifier("vit_tiny_patch16_224", 4, model_args=vit)
        run(tmp_path, *callbacks).test(module, datamodule=Calibrating(length=8), verbose=False)
        first, second = module.network.blocks
        assert first.product_calls[:2] == (0, 1)
        assert not any(call is not None for call in first.product_calls[2:])
        assert second.attn.product_calls == (0, 1)
        states.append(module.network.state_dict())
        answers.append(module.eval()(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*answers)
    mode = ProductMode([None, None])
    with mode:  # one more product than calibration saw stays as it is
        for _ in range(3):
            assert torch.equal(torch.eye(2) @ torch.eye(2), torch.eye(2))


def test_pruned_weights_stay_zero(tmp_path):
    module = resnet()
    weight = module.network.layer1[0].conv1.weight
    weight.data[:4] = 0
    run(tmp_path, HessianPTQ(**SMALL)).test(module, datamodule=Calibrating(length=8), verbose=False)
    assert not weight[:4].any()
    assert weight[4:].any()


class Keep(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_test_end(self, trainer, pl_module):
        torch.save(pl_module.network.state_dict(), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_have_the_steps_of_the_first(tmp_path):
    trainer = run(tmp_path, HessianPTQ(**SMALL), Keep(tmp_path), devices=2, strategy="ddp_fork")
    trainer.test(resnet(), datamodule=Calibrating(length=8), verbose=False)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = resnet()
    run(tmp_path / "one", HessianPTQ(**SMALL)).test(alone, datamodule=Calibrating(length=8), verbose=False)
    for name, tensor in alone.network.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], tensor)
    assert any(name.endswith("weight_operand.step") for name in first)


@pytest.mark.parametrize("source", ["fisher", "sequential_kl", "none"])
def test_the_search_lowers_its_own_objective(source, tmp_path, monkeypatch):
    """At every layer, the weighted error of the output is no larger than with the steps of min-max."""
    seen, search = [], QuantizedLayer.search

    def objective(unit, calls):
        weight, total = unit.weight(unit.layer.weight), 0.0
        for (x,), gradient in calls:
            output = torch.func.functional_call(unit.layer, {"weight": weight}, (unit.input(x),))
            total += float(((output - unit.layer(x)) * gradient).square().sum())
        return total

    @torch.no_grad()
    def watched(unit, calls, options):
        before = objective(unit, calls)
        search(unit, calls, options)
        seen.append((before, objective(unit, calls)))

    monkeypatch.setattr(QuantizedLayer, "search", watched)
    callback = HessianPTQ(**{**SMALL, "candidates": 40, "bits": 4, "grad_source": source})
    run(tmp_path, callback).test(resnet(), datamodule=Calibrating(length=8), verbose=False)
    assert len(seen) == len(callback.units)
    assert sum(after <= before * 1.0001 for before, after in seen) >= len(seen) - 1
    assert sum(after for _, after in seen) < 0.9 * sum(before for before, _ in seen)
    passes = len(callback.units) if source == "sequential_kl" else 1
    assert callback.report["calibration_passes"] == passes
