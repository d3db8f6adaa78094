"""The inference form gives the trained network's outputs with less work, and leaves the network alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from callbacks.deploy.onnx import export_onnx
from lightning_modules.deco.deploy import deploy
from lightning_modules.deco.network import Deco
from lightning_modules.deco.plus import DecoPlus
from lightning_modules.deco.plus_encoder import RepBlock
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


class Positional(nn.Module):
    """What the exporter takes: inputs by position."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images):
        return self.network(*images)


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_deco_gives_the_same(channels_last, batch):
    network = fill(Deco(**SMALL)).eval()
    deployed = deploy(network, channels_last)
    with torch.inference_mode():
        for height in (48, 64):
            images = inputs("deco/deploy", (batch, 3, height, 64))
            assert largest_difference(network(images), deployed(images)) < 1e-5


def test_deco_r50_gives_the_same():
    network = fill(Deco()).eval()
    deployed = deploy(network)
    with torch.inference_mode():
        images = inputs("deco/deploy", (1, 3, 128, 160))
        assert largest_difference(network(images), deployed(images)) < 1e-5
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {FrozenBatchNorm2d, nn.BatchNorm2d}
    assert len(deployed.class_embed) == len(deployed.bbox_embed) == 1
    assert len(network.class_embed) == 6, "the trained network must stay as it was"


def test_decoplus_gives_the_same(golden):
    case = golden["decoplus_r18_192x256"]  # its selection of queries does not hang on a rounding
    network = fill(DecoPlus(depth=18)).eval()
    deployed = deploy(network)
    images = inputs(case["input_label"], tuple(case["input_shape"]))
    with torch.inference_mode():
        assert largest_difference(network(images), deployed(images)) < 1e-5
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {RepBlock, nn.BatchNorm2d}
    assert len(deployed.decoder.dec_score_head) == 1
    assert len(deployed.decoder.dec_bbox_head) == 3


@pytest.mark.parametrize(("depth", "count"), [(18, 22_030_128), (50, 44_383_660)])
def test_fused_rep_blocks_have_the_published_number_of_parameters(depth, count):
    network = DecoPlus(depth=depth).eval()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RepBlock):
                setattr(parent, name, child.fused())
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_the_deployed_form_copies_pickles_and_takes_other_types():
    deployed = deploy(fill(Deco(**SMALL)))
    images = inputs("deco/deploy", (1, 3, 48, 64))
    with torch.inference_mode():
        before = deployed(images)
        for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
            assert largest_difference(before, other(images)) < 1e-6
        double = copy.deepcopy(deployed).double()
        assert (double(images.double())["logits"] - before["logits"]).abs().max() < 1e-4


def test_deployed_deco_exports_to_onnx_with_a_free_batch(tmp_path):
    deployed = Positional(deploy(fill(Deco(**SMALL)))).eval()
    report = export_onnx(deployed, (inputs("deco/onnx", (1, 3, 48, 64)),), tmp_path / "deco.onnx")
    assert report["max_abs_difference"] < 1e-4
    assert (tmp_path / "deco.onnx").is_file()


def test_a_counter_sees_the_work_of_the_deployed_form():
    network = fill(Deco(**SMALL)).eval()
    counts = []
    for form in (network, deploy(network)):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            form(inputs("deco/count", (1, 3, 48, 64)))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
