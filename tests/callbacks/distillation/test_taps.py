import logging

import pytest
import timm
import torch
from torch import nn

from callbacks.distillation.taps import Features, NetworkTaps, StageShape, classifier_path, stage_paths

TOKENS = [StageShape(16, 65, prefix_tokens=1)] * 4


@pytest.fixture
def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        depth=4,
        embed_dim=16,
        num_heads=2,
        num_classes=5,
    )


def record(network: nn.Module, size: int = 32, **options) -> tuple[NetworkTaps, Features]:
    taps = NetworkTaps(network.eval(), **options)
    taps.watch([1, 2, 3, 4], penultimate=True)
    with torch.no_grad():
        logits = network(torch.rand(2, 3, size, size))
    return taps, taps.collect(logits)


@pytest.mark.parametrize(
    ("name", "stages", "classifier"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"], "fc"),
        ("resnet50", ["layer1", "layer2", "layer3", "layer4"], "fc"),
        ("mobilenetv2_100", ["blocks.1", "blocks.2", "blocks.4", "bn2"], "classifier"),
        ("convnext_tiny", ["stages.0", "stages.1", "stages.2", "stages.3"], "head.fc"),
        ("deit_tiny_patch16_224", ["blocks.1", "blocks.3", "blocks.9", "blocks.11"], "head"),
        ("deit_tiny_distilled_patch16_224", ["blocks.1", "blocks.3", "blocks.9", "blocks.11"], "head"),
        ("vit_large_patch16_224", ["blocks.3", "blocks.7", "blocks.19", "blocks.23"], "head"),
        ("beitv2_base_patch16_224", ["blocks.1", "blocks.3", "blocks.9", "blocks.11"], "head"),
        ("swin_tiny_patch4_window7_224", ["layers.0", "layers.1", "layers.2", "layers.3"], "head.fc"),
        ("mixer_b16_224", ["blocks.1", "blocks.3", "blocks.9", "blocks.11"], "head"),
        ("resmlp_12_224", ["blocks.1", "blocks.3", "blocks.9", "blocks.11"], "head"),
    ],
)
def test_the_papers_families(name, stages, classifier):
    with torch.device("meta"):
        network = timm.create_model(name)
    assert stage_paths(network) == stages
    assert classifier_path(network) == classifier


@pytest.mark.parametrize(
    ("name", "shapes", "width"),
    [
        ("resnet18", [(64, 56), (128, 28), (256, 14), (512, 7)], 512),
        ("mobilenetv2_100", [(24, 56), (32, 28), (96, 14), (1280, 7)], 1280),
    ],
)
def test_shapes_of_cnns_at_224(name, shapes, width):
    taps, features = record(timm.create_model(name), size=224)
    found = taps.shapes(features)
    assert list(found.stages.values()) == [StageShape(channels, side, side) for channels, side in shapes]
    assert (found.penultimate, found.num_classes) == (width, 1000)


def test_an_unknown_family_falls_back_to_its_feature_info_and_says_so(caplog):
    network = timm.create_model("regnetx_002")
    with caplog.at_level(logging.INFO):
        assert stage_paths(network, "teacher regnetx_002") == ["s1", "s2", "s3", "s4"]
    assert "teacher regnetx_002: RegNet has no rule" in caplog.text
    taps, features = record(network)
    assert [shape.channels for shape in taps.shapes(features).stages.values()] == [24, 56, 152, 368]


def test_channels_last_maps_are_tokens():
    network = timm.create_model("test_mambaout")
    taps, features = record(network, size=64)
    assert taps.shapes(features).stages[1] == StageShape(16, 256)
    assert features.stages[4].shape == (2, 4, 64)


def test_a_late_class_token_is_no_prefix():
    network = timm.create_model("cait_xxs24_224", img_size=32)
    taps, features = record(network)
    assert taps.shapes(features).stages[1] == StageShape(192, 4)


def test_register_tokens_without_a_class_token_are_dropped():
    options = {"patch_size": 4, "depth": 4, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    network = timm.models.VisionTransformer(
        img_size=32, class_token=False, reg_tokens=3, global_pool="avg", **options
    )
    taps, features = record(network)
    assert taps.shapes(features).stages[2] == StageShape(16, 64)


def test_penultimate_feature_gives_the_logits(vit):
    _, features = record(vit)
    torch.testing.assert_close(vit.head(features.penultimate), features.logits)


def test_named_paths_replace_the_rule(vit):
    taps, features = record(vit, paths=["blocks.0", "blocks.1", "blocks.2", "blocks.3"])
    assert list(taps.shapes(features).stages.values()) == TOKENS
    plain = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain.append(nn.Linear(3, 2))
    taps, features = record(plain, paths=["0", "1", "2", "3"])
    assert taps.shapes(features).penultimate == 3


def test_paths_and_families_that_do_not_exist(vit):
    with pytest.raises(ValueError, match=r"student: taps: .*'blokcs.0'.*blocks.0"):
        NetworkTaps(vit, ["blokcs.0"], "student").watch([1], False)
    with pytest.raises(ValueError, match="stage 2 has no tap"):
        NetworkTaps(vit, ["blocks.0"], "student").watch([2], False)
    with pytest.raises(ValueError, match="teacher_taps"):
        stage_paths(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="2 blocks"):
        stage_paths(timm.models.VisionTransformer(img_size=32, depth=2, embed_dim=16, num_heads=2))
    with pytest.raises(ValueError, match="no classifier"):
        classifier_path(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_gradient_checkpointing_does_not_record_twice(vit):
    vit.train().set_grad_checkpointing(True)
    taps = NetworkTaps(vit, training_only=True)
    taps.watch([2], penultimate=False)
    logits = vit(torch.rand(2, 3, 32, 32))
    features = taps.collect(logits)
    features.stages[2].square().mean().backward()
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="gave no stage2"):
        taps.collect(logits)


def test_nothing_is_recorded_in_evaluation_nor_after_removal(vit):
    hooks = {name: len(module._forward_hooks) for name, module in vit.named_modules()}
    taps = NetworkTaps(vit, training_only=True)
    taps.watch([1, 2, 3, 4], penultimate=True)
    vit.eval()(torch.rand(1, 3, 32, 32))
    assert not taps.outputs
    vit.train()(torch.rand(1, 3, 32, 32))
    assert len(taps.outputs) == 5
    taps.remove()
    assert not taps.outputs
    assert {name: len(module._forward_hooks) for name, module in vit.named_modules()} == hooks
    assert not vit._forward_pre_hooks


def test_a_compiled_network_is_tapped_alike(vit):
    images = torch.rand(2, 3, 32, 32)
    vit.eval()
    taps = NetworkTaps(vit)
    taps.watch([1, 4], penultimate=True)
    with torch.no_grad():
        plain = taps.collect(vit(images))
        vit.compile(backend="eager")
        compiled = taps.collect(vit(images))
    torch.testing.assert_close(compiled.logits, plain.logits)
    torch.testing.assert_close(compiled.penultimate, plain.penultimate)
    torch.testing.assert_close(compiled.stages, plain.stages)
