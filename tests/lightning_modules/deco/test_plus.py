"""DECO+'s network against the recorded numbers, its selection of queries, and its edges."""

import math

import numpy as np
import pytest
import torch

from lightning_modules.deco.backbones import ResNetD
from lightning_modules.deco.layers import InceptionDepthwise, InteractionLayer
from lightning_modules.deco.losses import VarifocalCriterion, pad_targets
from lightning_modules.deco.plus import DecoPlus, anchors_of, inverse_sigmoid
from lightning_modules.deco.plus_encoder import RepBlock
from tests.golden.fill import fill, inputs


@pytest.mark.parametrize(
    "name", ["decoplus_r18_192x256", "decoplus_r50_192x256", "decoplus_r18_32x416_masked_border"]
)
def test_network_is_the_recorded_one(name, golden, agrees):
    case = golden[name]
    config, records = case["config"], case["outputs"]
    options = {}
    if "num_queries" in config:
        options = {"num_queries": config["num_queries"], "grid_height": config["qH"]}
    network = fill(DecoPlus(depth=config["depth"], **options)).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == case["params"]
    scores = []
    network.decoder.enc_score_head.register_forward_hook(lambda *call: scores.append(call[-1]))
    images = inputs(case["input_label"], tuple(case["input_shape"]))
    with torch.no_grad():
        features = network.backbone(images)
        levels = network.encoder(list(features))
        projected = [
            project(level) for project, level in zip(network.decoder.input_proj, levels, strict=True)
        ]
        outputs = network(images)
        agrees(network.decoder.fuse(projected), records["decoder_memory"])
    for stride, feature, level in zip((8, 16, 32), features, levels, strict=True):
        agrees(feature, records[f"backbone_s{stride}"])
        agrees(level, records[f"encoder_s{stride}"])
    agrees(scores[0], records["enc_logits"])
    agrees(outputs["logits"], records["pred_logits"])
    agrees(outputs["boxes"], records["pred_boxes"])
    if "invalid_tokens" in case:
        ones = (outputs["boxes"] > 0.999).all(dim=-1).sum().item()
        assert ones == case["invalid_tokens_selected"]


def test_train_step_is_the_recorded_one(golden, agrees):
    case = golden["decoplus_r18_train"]
    network = fill(DecoPlus(depth=18)).train()
    outputs = network(inputs(case["input_label"], tuple(case["input_shape"])))
    agrees(outputs["logits"], case["outputs"]["pred_logits"])
    agrees(outputs["boxes"], case["outputs"]["pred_boxes"])
    for layer in range(case["num_aux"]):
        agrees(outputs["aux_logits"][layer], case["outputs"][f"aux{layer}_logits"])
        agrees(outputs["aux_boxes"][layer], case["outputs"][f"aux{layer}_boxes"])
    labels = [torch.tensor(target["labels"]) for target in case["targets"]]
    targets = pad_targets(labels, [torch.tensor(target["boxes"]) for target in case["targets"]], 80)
    terms = VarifocalCriterion()(outputs, targets)
    assert set(terms) == set(case["losses"])
    for term, value in terms.items():
        assert value.item() == pytest.approx(case["losses"][term], rel=1e-4), term
    total = sum(terms.values())
    assert total.item() == pytest.approx(case["total"], rel=1e-4)
    total.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    for group, expected in case["grad_norm_by_group"].items():
        squares = [
            p.grad.double().square().sum() for n, p in network.named_parameters() if n.startswith(f"{group}.")
        ]
        assert math.sqrt(sum(squares)) == pytest.approx(expected, rel=1e-3)


def test_decoder_layer_is_the_recorded_one(golden, agrees):
    case = golden["decoplus_decoder_layer"]
    dim, grid, label = case["d"], (case["qH"], case["qW"]), case["label"]
    layer = fill(InteractionLayer(dim, InceptionDepthwise(dim, case["inceptH"], case["inceptW"])))
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(case["names"])
    shape = (case["batch"], grid[0] * grid[1], dim)
    queries, position = (
        inputs(f"{label}/{part}", shape).transpose(1, 2).unflatten(2, grid) for part in ("tgt", "pos")
    )
    memory = inputs(f"{label}/memory", (case["batch"], dim, *case["feature"]))
    agrees(layer(queries, memory, position).flatten(2).transpose(1, 2), case["output"])


def test_rep_block_and_its_fusion_are_the_recorded_ones(golden, agrees):
    case = golden["decoplus_rep_block"]
    block = fill(RepBlock(case["channels"])).eval()
    features = inputs(case["label"], tuple(case["input_shape"]))
    with torch.no_grad():
        agrees(block(features), case["output"])
        fused = block.fused()
        agrees(fused[0].weight, case["fused_kernel"])
        agrees(fused[0].bias, case["fused_bias"])
        assert (fused(features) - block(features)).abs().max() < 1e-5


def test_anchors_are_the_recorded_ones(golden):
    for case in golden["decoplus_anchors"]:
        height, width = case["size"]
        sizes = [(height // stride, width // stride) for stride in (8, 16, 32)]
        logits, valid = anchors_of(sizes, torch.zeros(1))
        tokens = [h * w for h, w in sizes]
        assert tokens == case["tokens"]
        assert [part.sum().item() for part in valid.flatten().split(tokens)] == case["valid"]
        finite = logits[valid.flatten() > 0]
        assert finite.double().sum().item() == pytest.approx(case["finite_sum"], rel=1e-4, abs=1e-2)
        assert finite.double().abs().sum().item() == pytest.approx(case["finite_abs_sum"], rel=1e-4)
        assert valid.flatten().nonzero()[0].item() == case["first_valid_index"]
        np.testing.assert_allclose(finite[0], case["first_valid"], rtol=1e-5)
        np.testing.assert_allclose(finite[-1], case["last_valid"], rtol=1e-5)
        assert logits[valid.flatten() == 0].isposinf().all()


# By hand


def plus(**options):
    defaults = {"num_classes": 4, "depth": 18, "num_queries": 12, "grid_height": 3, "hidden_dim": 16}
    return DecoPlus(**{**defaults, "encoder_depth": 1, "decoder_layers": 2, **options})


def test_initial_boxes_are_the_selected_anchors():
    torch.manual_seed(0)
    network = plus().eval()
    boxes = network(torch.rand(2, 3, 64, 96))["boxes"]
    sides = boxes[..., 2:]
    assert torch.equal(sides[..., 0].round(decimals=3), sides[..., 1].round(decimals=3))
    assert set(sides.flatten().round(decimals=3).tolist()) <= set(torch.tensor([0.05, 0.1, 0.2]).tolist())
    biases = [head.bias for head in (network.decoder.enc_score_head, *network.decoder.dec_score_head)]
    assert all(torch.allclose(bias, torch.full((4,), -math.log(99))) for bias in biases)


def test_selected_queries_are_in_the_order_of_their_scores():
    network = fill(plus()).eval()
    levels = network.encoder(network.backbone(torch.rand(1, 3, 64, 96)))
    levels = [project(level) for project, level in zip(network.decoder.input_proj, levels, strict=True)]
    _, _, logits = network.decoder.select(levels)
    best = logits.amax(dim=-1)[0]
    assert (best[:-1] >= best[1:]).all()


def test_invalid_anchors_give_finite_losses_and_gradients():
    """At 32 x 416 the outer tokens of the finest level are invalid, and all are selected."""
    torch.manual_seed(0)
    network = fill(plus(num_queries=270, grid_height=15)).train()
    outputs = network(inputs("decoplus/thin", (2, 3, 32, 416)))
    assert outputs["boxes"].isfinite().all()
    targets = pad_targets([torch.tensor([1]), torch.tensor([2])], [torch.full((1, 4), 0.3)] * 2, 4)
    sum(VarifocalCriterion()(outputs, targets).values()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_looking_forward_twice_changes_gradients_and_no_values():
    network = fill(plus()).train()
    images = inputs("decoplus/twice", (2, 3, 64, 96))
    outputs = network(images)
    first = network.decoder.dec_bbox_head[0].layers[-1].weight
    (gradient,) = torch.autograd.grad(outputs["boxes"].sum(), first)
    assert gradient.abs().max() > 0  # the last layer's boxes reach the first layer's head
    logit = inverse_sigmoid(torch.tensor([0.0, 1.0, 0.5, 1e-7]))
    assert logit.tolist() == pytest.approx([-11.5129, 11.5129, 0.0, -11.5129], abs=1e-3)


def test_an_earlier_layer_can_count():
    images = inputs("decoplus/early", (1, 3, 64, 96))
    both = fill(plus()).eval()
    both.all_layers = True
    early = fill(plus(eval_idx=0)).eval()
    with torch.no_grad():
        assert torch.allclose(early(images)["boxes"], both(images)["aux_boxes"][0], atol=1e-5)
        early.drop_auxiliary()
        assert torch.allclose(early(images)["logits"], both(images)["aux_logits"][0], atol=1e-5)


@pytest.mark.parametrize("level", [0, 2])
def test_the_memory_can_be_at_any_level(level):
    network = fill(plus(memory_level=level)).eval()
    levels = network.encoder(network.backbone(torch.rand(1, 3, 64, 96)))
    levels = [project(each) for project, each in zip(network.decoder.input_proj, levels, strict=True)]
    assert network.decoder.fuse(levels).shape[-2:] == levels[level].shape[-2:]


def test_frozen_parts_are_the_published_ones():
    fifty, eighteen = ResNetD(50), ResNetD(18)
    assert [n for n, p in fifty.named_parameters() if not p.requires_grad] == [
        f"conv1.conv1_{place}.conv.weight" for place in (1, 2, 3)
    ]
    assert not any("norm" in name for name, _ in fifty.named_parameters())
    assert all(p.requires_grad for p in eighteen.parameters())
    trainable = sum(p.numel() for p in DecoPlus().parameters() if p.requires_grad)
    assert trainable == 45_150_796


def test_images_that_do_not_fit_are_named():
    network = plus(num_queries=300, grid_height=15).eval()
    with pytest.raises(ValueError, match="96x128 has 252 tokens, fewer than the 300"):
        network(torch.rand(1, 3, 96, 128))
    with pytest.raises(ValueError, match="multiples of 32, not 100x128"):
        network(torch.rand(1, 3, 100, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 13}, "num_queries: 13"),
        ({"memory_level": 3}, "memory_level"),
        ({"eval_idx": 2}, "eval_idx"),
        ({"depth": 34}, "depth"),
        ({"branch_ratio": 0.5}, "branch_ratio"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plus(**options)
