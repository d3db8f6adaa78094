"""Checkpoints with the authors' names, and ImageNet backbones under torchvision's and timm's."""

import argparse

import pytest
import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchvision.models import resnet50

from lightning_modules.deco.network import Deco
from lightning_modules.deco.plus import DecoPlus
from lightning_modules.deco.released import backbone_state, load_backbone, load_detector
from tests.golden.fill import fill, inputs

SMALL = {
    "num_classes": 6,
    "backbone": "small",
    "num_queries": 20,
    "grid_height": 4,
    "hidden_dim": 24,
    "encoder_widths": (8, 16, 24),
    "encoder_depths": (1, 1, 1),
    "decoder_layers": 2,
}
PLUS = {
    "num_classes": 4,
    "depth": 18,
    "num_queries": 12,
    "grid_height": 3,
    "hidden_dim": 16,
    "encoder_depth": 1,
    "decoder_layers": 2,
}


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_released_deco_file_loads_without_its_aliases(tmp_path):
    network = fill(Deco(**SMALL))
    state = network.state_dict()
    boxes = [name for name in state if name.startswith("bbox_embed.")]
    aliases = {f"deco_convnet.decoder.{name}": state[name] for name in boxes}
    arguments = argparse.Namespace(lr=1e-4, output_dir="out", masks=False)
    file = {"model": {**state, **aliases}, "optimizer": {}, "epoch": 149, "args": arguments}
    torch.save(file, tmp_path / "deco.pth")
    other = Deco(**SMALL)
    load_detector(other, tmp_path / "deco.pth")
    assert same(network, other)


def test_a_released_decoplus_file_loads_its_averaged_weights(tmp_path):
    averaged, last = fill(DecoPlus(**PLUS)), DecoPlus(**PLUS)
    ema = {"module": averaged.state_dict(), "updates": 10, "warmups": 2000}
    torch.save({"model": last.state_dict(), "ema": ema, "last_epoch": 1, "date": "x"}, tmp_path / "plus.pth")
    other = DecoPlus(**PLUS)
    load_detector(other, tmp_path / "plus.pth")
    assert same(averaged, other)


def test_our_own_checkpoint_loads(tmp_path):
    network = fill(Deco(**SMALL))
    state = {f"network.{name}": values for name, values in network.state_dict().items()}
    file = {"pytorch-lightning_version": "2.6.0", "state_dict": {**state, "objectives.kd.x": torch.ones(1)}}
    torch.save(file, tmp_path / "last.ckpt")
    other = Deco(**SMALL)
    load_detector(other, tmp_path / "last.ckpt")
    assert same(network, other)


class Evil:
    """What only pickled code could restore."""


def test_a_file_that_needs_code_is_refused(tmp_path):
    torch.save({"model": {}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(MisconfigurationException, match="needs pickled code"):
        load_detector(Deco(**SMALL), tmp_path / "evil.pth")


def test_a_file_of_another_network_is_refused_with_its_keys(tmp_path):
    torch.save({"model": DecoPlus(**PLUS).state_dict()}, tmp_path / "plus.pth")
    with pytest.raises(MisconfigurationException, match=r"does not fit Deco(.|\n)*query_embed.weight"):
        load_detector(Deco(**SMALL), tmp_path / "plus.pth")


def test_the_names_are_the_released_ones():
    """Counts of the whole files, and one name of every part that the release's listing has."""
    deco, convnext = Deco().state_dict(), Deco(backbone="convnext_tiny").state_dict()
    plus18, plus50 = DecoPlus(depth=18).state_dict(), DecoPlus(depth=50).state_dict()
    assert (len(deco), len(plus18), len(plus50)) == (527, 568, 771)
    listed = {
        "backbone.0.body.layer4.0.downsample.1.running_var",
        "input_proj.bias",
        "query_embed.weight",
        "deco_convnet.tgt.weight",
        "deco_convnet.encoder._encoder.downsample_layers.1.0.weight",
        "deco_convnet.encoder._encoder.stages.1.5.pwconv2.bias",
        "deco_convnet.encoder._encoder.norm.weight",
        "deco_convnet.decoder.layers.5.pwconv1_2.weight",
        "deco_convnet.decoder.norm.bias",
        "class_embed.5.weight",
        "bbox_embed.0.layers.2.bias",
    }
    assert listed <= deco.keys()
    body = "backbone.0.body"
    assert {f"{body}.downsample_layers.0.1.weight", f"{body}.stages.3.2.gamma"} <= convnext.keys()
    shared = {
        "backbone.conv1.conv1_3.norm.weight",
        "backbone.layers.0.blocks.0.short.conv.weight",
        "backbone.layers.3.blocks.0.short.conv.norm.running_mean",
        "encoder.input_proj.2.0.weight",
        "encoder.encoder.0.self_attn.stages.0.3.gamma",
        "encoder.lateral_convs.1.conv.weight",
        "encoder.fpn_blocks.1.bottlenecks.2.conv2.norm.bias",
        "encoder.downsample_convs.1.norm.bias",
        "encoder.pan_blocks.0.conv2.conv.weight",
        "decoder.input_proj.1.norm.weight",
        "decoder.output_proj.conv.weight",
        "decoder.downsample_convs.0.conv.weight",
        "decoder.decoder.layers.2.dwconv1.dwconv_w.bias",
        "decoder.query_pos_head.layers.1.weight",
        "decoder.enc_output.1.bias",
        "decoder.enc_score_head.bias",
        "decoder.enc_bbox_head.layers.2.weight",
        "decoder.dec_score_head.2.bias",
        "decoder.dec_bbox_head.2.layers.0.weight",
    }
    assert shared <= plus18.keys()
    assert shared <= plus50.keys()
    assert "encoder.fpn_blocks.0.conv3.conv.weight" in plus18
    assert "backbone.layers.3.blocks.2.branch3.conv.weight" in plus50


# Backbones


@torch.no_grad()
def test_timm_convnext_gives_the_same_features(tmp_path):
    theirs = fill(timm.create_model("convnext_tiny")).eval()
    torch.save(theirs.state_dict(), tmp_path / "convnext.pth")
    network = Deco(**{**SMALL, "backbone": "convnext_tiny"}).eval()
    load_backbone(network, tmp_path / "convnext.pth")
    images = inputs("deco/backbone", (1, 3, 64, 96))
    expected = theirs.stages(theirs.stem(images))
    assert torch.allclose(network.backbone(images), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50])
def test_timm_resnet_d_gives_the_same_features(depth, tmp_path):
    theirs = fill(timm.create_model(f"resnet{depth}d")).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    network = DecoPlus(**{**PLUS, "depth": depth}).eval()
    load_backbone(network, tmp_path / "resnet.pth")
    images = inputs("deco/backbone", (1, 3, 64, 96))
    expected = theirs.forward_features(images)
    assert torch.allclose(network.backbone(images)[-1], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_torchvision_resnet_gives_the_same_features(tmp_path):
    theirs = fill(resnet50()).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    network = Deco(**{**SMALL, "backbone": "resnet50"}).eval()
    load_backbone(network, tmp_path / "resnet.pth")
    images = inputs("deco/backbone", (1, 3, 64, 96))
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    expected = theirs(images).view(1, 2048, 2, 3)
    assert torch.allclose(network.backbone(images), expected, rtol=1e-4, atol=1e-4)


def test_own_names_stay_and_a_classifier_is_left_out():
    backbone = Deco(**{**SMALL, "backbone": "convnext_tiny"}).backbone[0].body
    own = dict(backbone.state_dict())
    found = backbone_state(backbone, {**own, "norm.weight": torch.ones(768), "head.bias": torch.ones(9)})
    assert found.keys() == own.keys()


def test_a_backbone_without_imagenet_weights_says_so():
    with pytest.raises(MisconfigurationException, match="no ImageNet weights of SmallConvNet"):
        load_backbone(Deco(**SMALL), "pretrained")
