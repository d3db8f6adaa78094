"""DECO's network against the recorded numbers, its initialisation, and what must and must not change it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.deco.layers import InteractionLayer, depthwise, pool_to_grid, resize
from lightning_modules.deco.losses import FocalCriterion, assignment_errors, pad_targets
from lightning_modules.deco.network import Deco
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


def padded(images: list[torch.Tensor]) -> torch.Tensor:
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack(
        [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )


def recorded_images(case: dict) -> torch.Tensor:
    label = case["input_label"]
    return padded([inputs(f"{label}/{i}", tuple(shape)) for i, shape in enumerate(case["input_shapes"])])


@pytest.mark.parametrize("name", ["deco_r50_256x320", "deco_r50_padded_pair", "deco_convnext_t_224x288"])
def test_network_is_the_recorded_one(name, golden, agrees):
    case = golden[name]
    network = fill(Deco(backbone=case["config"]["backbone"])).eval()
    network.all_layers = True
    images = recorded_images(case)
    with torch.no_grad():
        feature = network.backbone(images)
        memory = network.deco_convnet.encoder(network.input_proj(feature))
        outputs = network(images)
    records = case["outputs"]
    assert sum(parameter.numel() for parameter in network.parameters()) == case["params"]
    agrees(feature, records["backbone_feature"])
    agrees(memory, records["encoder_memory"])
    agrees(outputs["logits"], records["pred_logits"])
    agrees(outputs["boxes"], records["pred_boxes"])
    agrees(outputs["aux_logits"][0], records["aux0_logits"])
    agrees(outputs["aux_boxes"][0], records["aux0_boxes"])
    agrees(outputs["aux_logits"][4], records["aux4_logits"])


def test_decoder_layer_is_the_recorded_one(golden, agrees):
    case = golden["deco_decoder_layer"]
    dim, grid, label = case["d"], (case["qH"], case["qW"]), case["label"]
    layer = fill(InteractionLayer(dim, depthwise(dim, 9)))
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(case["names"])
    queries, position = (inputs(f"{label}/{part}", (case["batch"], dim, *grid)) for part in ("tgt", "pos"))
    memory = inputs(f"{label}/memory", (case["batch"], dim, *case["feature"]))
    agrees(layer(queries, memory, position), case["output"])


def test_query_grid_maps_are_the_recorded_ones(golden):
    for case in golden["query_grid"]:
        queries, length = case["queries"], case["feature"]
        row = torch.arange(queries, dtype=torch.float32).view(1, 1, 1, queries)
        raised = resize(row, (1, length))
        assert raised.flatten().int().tolist() == case["source_query_of_each_cell"]
        for query, (start, end) in enumerate(case["pool_window_of_each_query"]):
            for cell in (start, end - 1, start - 1, end):
                if 0 <= cell < length:
                    feature = torch.zeros(1, 1, 1, length)
                    feature[..., cell] = 1
                    assert pool_to_grid(feature, (1, queries))[0, 0, 0, query] == float(start <= cell < end)


def test_nearest_takes_the_exact_integer_source_up_to_84_cells():
    """That is 2688 pixels for DECO, 1344 for DECO+; torch's float arithmetic is off by a cell from 92 on."""
    for queries in (5, 10, 15, 20):
        row = torch.arange(queries, dtype=torch.float32).view(1, 1, 1, queries)
        for length in range(1, 85):
            expected = [cell * queries // length for cell in range(length)]
            assert resize(row, (1, length)).flatten().int().tolist() == expected


def test_train_step_is_the_recorded_one(golden):
    case = golden["deco_train_step_r50"]
    network = fill(Deco()).train()
    labels = [torch.tensor(target["labels"]) for target in case["targets"]]
    targets = pad_targets(labels, [torch.tensor(target["boxes"]) for target in case["targets"]], 91)
    criterion, outputs = FocalCriterion(), network(recorded_images(case))
    assignment = criterion.assign(outputs, targets)
    terms = criterion(outputs, targets, assignment)
    for term, value in terms.items():
        weight = criterion.weights["_".join(term.split("_")[:2])]
        assert value.item() / weight == pytest.approx(case["losses"][term], rel=1e-4), term
    errors = assignment_errors(outputs["logits"], targets, assignment)
    assert errors["class_error"].item() == pytest.approx(case["losses"]["class_error"])
    total = sum(terms.values())
    assert total.item() == pytest.approx(case["total"], rel=1e-4)
    total.backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    # the release leaves its unused norm trainable; here it is frozen, so that plain DDP works
    unused = case["trainable_without_grad"]
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert sorted(without) == sorted(frozen)
    assert sorted(set(frozen) - set(unused)) == sorted(n for n in frozen if n.startswith("backbone."))
    assert len(set(frozen) - set(unused)) == case["frozen"]
    squares = {"backbone": 0.0, "encoder": 0.0, "rest": 0.0}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            group = "backbone" if "backbone" in name else "encoder" if "encoder" in name else "rest"
            squares[group] += parameter.grad.double().square().sum().item()
    for group, value in squares.items():
        assert math.sqrt(value) == pytest.approx(case["grad_norm_by_group"][group], rel=1e-3)
    assert math.sqrt(sum(squares.values())) == pytest.approx(case["grad_norm"], rel=1e-3)


# Initialisation


def test_initial_boxes_and_scores_are_all_the_same():
    torch.manual_seed(0)
    network = Deco(**SMALL).train()
    outputs = network(torch.randn(2, 3, 64, 80))
    side = 1 / (1 + math.exp(2))
    expected = torch.tensor([0.5, 0.5, side, side])
    assert torch.allclose(outputs["boxes"], expected.expand(2, 20, 4), atol=1e-6)
    assert torch.allclose(outputs["aux_boxes"], expected.expand(1, 2, 20, 4), atol=1e-6)
    biases = [head.bias for head in network.class_embed]
    assert all(torch.allclose(bias, torch.full((6,), -math.log(99))) for bias in biases)
    assert torch.equal(network.class_embed[0].weight, network.class_embed[1].weight)


def test_encoder_and_decoder_are_xavier_uniform_and_gammas_small():
    torch.manual_seed(0)
    network = Deco(**{**SMALL, "hidden_dim": 480, "encoder_widths": (8, 16, 480)})
    layer = network.deco_convnet.decoder.layers[0]
    bound = math.sqrt(6 / (81 + 81 * 480))
    assert bound == pytest.approx(0.01241, rel=1e-3)
    assert 0.98 * bound < layer.dwconv1.weight.abs().max() <= bound
    assert torch.equal(layer.gamma1, torch.full((480,), 1e-6))
    stage = network.deco_convnet.encoder._encoder.stages[2][0]
    assert stage.pwconv1.bias.abs().max() == 0
    assert layer.pwconv1_1.bias.abs().max() > 0
    assert network.query_embed.weight.std().item() == pytest.approx(1, rel=0.05)
    table = network.deco_convnet.tgt.weight
    assert table.abs().max() <= math.sqrt(6 / sum(table.shape))


# Behaviour


@pytest.fixture
def small():
    return fill(Deco(**SMALL)).eval()


def test_eval_gives_the_last_layer_alone_and_training_all(small):
    images = torch.randn(1, 3, 64, 64)
    assert set(small(images)) == {"logits", "boxes"}
    outputs = small.train()(images)
    assert outputs["aux_logits"].shape == (1, 1, 20, 6)
    assert outputs["aux_boxes"].shape == (1, 1, 20, 4)


def test_an_image_does_not_depend_on_its_neighbours_but_on_its_padding(small):
    images = inputs("deco/test/images", (2, 3, 56, 64))
    with torch.no_grad():
        together, alone = small(images), small(images[:1])
        wider = small(F.pad(images[:1], (0, 32)))
    assert torch.allclose(together["logits"][:1], alone["logits"], atol=1e-5)
    assert not torch.allclose(wider["logits"], alone["logits"], atol=1e-3)


def test_queries_live_on_a_grid(small):
    images = inputs("deco/test/images", (1, 3, 56, 64))
    order = torch.arange(20).flip(0).roll(3)
    with torch.no_grad():
        before = small(images)["logits"]
        small.deco_convnet.tgt.weight.copy_(small.deco_convnet.tgt.weight[order])
        small.query_embed.weight.copy_(small.query_embed.weight[order])
        after = small(images)["logits"]
    assert not torch.allclose(before[:, order], after, atol=1e-3)


def test_gamma_zero_leaves_the_branches_out():
    layer = fill(InteractionLayer(8, depthwise(8, 3), kernel=3))
    nn.init.zeros_(layer.gamma1)
    nn.init.zeros_(layer.gamma2)
    queries, memory = torch.randn(1, 8, 2, 2), torch.randn(1, 8, 4, 4)
    raised = F.interpolate(queries, (4, 4))
    crossed = raised + layer.dwconv2(raised + memory)
    normed = F.layer_norm(crossed.permute(0, 2, 3, 1), (8,), layer.norm2.weight, layer.norm2.bias, 1e-6)
    expected = F.max_pool2d(normed.permute(0, 3, 1, 2), 2)
    assert torch.allclose(layer(queries, memory, torch.randn(1, 8, 2, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "mul"},
        {"fusion": "concat"},
        {"upsample": "bilinear"},
        {"pool": "avg"},
        {"decoder_kernel": 3},
    ],
)
def test_ablations_run_and_differ(options, small):
    images = inputs("deco/test/images", (1, 3, 56, 64))
    with torch.no_grad():
        other = fill(Deco(**SMALL, **options)).eval()(images)
        assert not torch.allclose(other["logits"], small(images)["logits"], atol=1e-4)


def test_features_smaller_than_the_grid_work():
    network = fill(Deco(**{**SMALL, "num_queries": 100, "grid_height": 10})).eval()
    assert network(torch.randn(1, 3, 24, 40))["boxes"].isfinite().all()


def test_dilation_keeps_stride_16():
    network = Deco(dilation=True)
    stage = network.backbone[0].body.layer4
    assert stage[0].conv2.stride == (1, 1)
    assert stage[0].conv2.dilation == (1, 1)
    assert stage[1].conv2.dilation == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 101}, "num_queries: 101 .* grid_height = 4"),
        ({"hidden_dim": 32}, "hidden_dim: .* 32 .* 24"),
        ({"encoder_depths": (1, 1)}, "encoder_depths"),
        ({"dilation": True}, "dilation"),
        ({"decoder_kernel": 4}, "odd"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Deco(**{**SMALL, **options})
