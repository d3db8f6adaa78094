"""Matching and losses of DECO and DECO+ against the recorded numbers, by hand, and at their edges."""

import math

import numpy as np
import pytest
import torch

from lightning_modules.deco.boxes import detections_of, iou_and_giou, normalised
from lightning_modules.deco.losses import (
    FocalCriterion,
    VarifocalCriterion,
    assign,
    assignment_costs,
    assignment_errors,
    pad_targets,
)
from tests.golden.fill import inputs

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def recorded_targets(case: dict):
    labels = [torch.tensor(t["labels"], dtype=torch.int64) for t in case["targets"]]
    boxes = [torch.tensor(t["boxes"], dtype=torch.float32).reshape(-1, 4) for t in case["targets"]]
    return pad_targets(labels, boxes, case["num_classes"])


def recorded_outputs(case: dict) -> dict[str, torch.Tensor]:
    queries, classes = case["num_queries"], case["num_classes"]
    images = len(case["targets"])

    def one(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        logits = inputs(f"{case['label']}/{name}/logits", (images, queries, classes)) + case["logit_shift"]
        return logits, inputs(f"{case['label']}/{name}/boxes", (images, queries, 4)).sigmoid()

    logits, boxes = one("main")
    layers = [one(f"aux{k}") for k in range(case["num_aux"])]
    return {
        "logits": logits.requires_grad_(),
        "boxes": boxes.requires_grad_(),
        "aux_logits": torch.stack([layer[0] for layer in layers]),
        "aux_boxes": torch.stack([layer[1] for layer in layers]),
    }


def pairs_of(assignment, layer: int, images: int) -> list[list[list[int]]]:
    here = assignment.layer == layer
    return [
        [
            assignment.query[here & (assignment.image == i)].tolist(),
            assignment.object[here & (assignment.image == i)].tolist(),
        ]
        for i in range(images)
    ]


@pytest.mark.parametrize("name", ["deco_criterion", "deco_criterion_no_objects"])
def test_deco_criterion_is_the_recorded_one(name, golden, agrees):
    case = golden[name]
    criterion, targets, outputs = FocalCriterion(), recorded_targets(case), recorded_outputs(case)
    assignment = criterion.assign(outputs, targets)
    images, last = len(case["targets"]), case["num_aux"]
    assert pairs_of(assignment, last, images) == case["matches"]
    assert [pairs_of(assignment, k, images) for k in range(last)] == case["aux_matches"]
    terms = criterion(outputs, targets, assignment)
    for term, value in terms.items():
        weight = criterion.weights["_".join(term.split("_")[:2])]
        assert value.item() / weight == pytest.approx(case["losses"][term], rel=1e-5, abs=1e-7), term
    total = sum(terms.values())
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    total.backward()
    agrees(outputs["logits"].grad, case["grad_logits"], 1e-5, 1e-6)
    agrees(outputs["boxes"].grad, case["grad_boxes"], 1e-5, 1e-6)
    errors = assignment_errors(outputs["logits"], targets, assignment)
    for term, value in errors.items():
        assert value.item() == pytest.approx(case["losses"][term], rel=1e-5)


@pytest.mark.parametrize("name", ["decoplus_criterion", "decoplus_criterion_no_objects"])
def test_decoplus_criterion_is_the_recorded_one(name, golden, agrees):
    case = golden[name]
    criterion, targets, outputs = VarifocalCriterion(), recorded_targets(case), recorded_outputs(case)
    assignment = criterion.assign(outputs, targets)
    assert pairs_of(assignment, case["num_aux"], len(case["targets"])) == case["matches"]
    terms = criterion(outputs, targets, assignment)
    assert set(terms) == set(case["weighted_losses"])
    for term, value in terms.items():
        assert value.item() == pytest.approx(case["weighted_losses"][term], rel=1e-5, abs=1e-7), term
    total = sum(terms.values())
    assert total.item() == pytest.approx(case["total"], rel=1e-5)
    total.backward()
    agrees(outputs["logits"].grad, case["grad_logits"], 1e-5, 1e-6)
    agrees(outputs["boxes"].grad, case["grad_boxes"], 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("name", "sizes", "ids"),
    [
        ("deco_postprocess", "sizes_hw", None),
        ("decoplus_postprocess", "sizes_wh", torch.tensor(COCO_IDS)),
    ],
)
def test_detections_are_the_recorded_ones(name, sizes, ids, golden):
    case = golden[name]
    images, queries, classes = len(case[sizes]), case["num_queries"], case["num_classes"]
    logits = inputs(f"{case['label']}/logits", (images, queries, classes)) + case["logit_shift"]
    boxes = inputs(f"{case['label']}/boxes", (images, queries, 4)).sigmoid()
    hw = torch.tensor(case[sizes], dtype=torch.float32)
    found = detections_of(logits, boxes, hw if sizes == "sizes_hw" else hw.flip(-1), queries, ids)
    for image, record in enumerate(case["results"]):
        scores, labels, corners = (part[image] for part in found)
        assert len(scores) == record["n"]
        np.testing.assert_allclose(scores[:8].numpy(), record["scores8"], rtol=1e-5)
        assert labels[:8].tolist() == record["labels8"]
        np.testing.assert_allclose(corners[:4].numpy(), record["boxes4"], rtol=1e-5, atol=1e-3)
        assert scores.sum().item() == pytest.approx(record["score_sum"], rel=1e-5)
        assert labels.sum().item() == record["label_sum"]
        assert corners.double().sum().item() == pytest.approx(record["box_sum"], rel=1e-4)


# By hand


def test_closed_forms_of_the_losses():
    none = pad_targets([torch.empty(0, dtype=torch.int64)], [torch.empty(0, 4)], 91)
    boxes = torch.full((1, 100, 4), 0.5)
    logits = torch.full((1, 100, 91), -math.log(99))
    terms = FocalCriterion(class_weight=1)({"logits": logits, "boxes": boxes}, none)
    assert terms["loss_ce"].item() == pytest.approx(0.00685936, rel=1e-5)
    assert terms["loss_bbox"].item() == terms["loss_giou"].item() == 0
    one = pad_targets([torch.tensor([3])], [torch.full((1, 4), 0.5)], 91)
    with_one = FocalCriterion(class_weight=1)({"logits": logits, "boxes": boxes}, one)
    assert (with_one["loss_ce"] - terms["loss_ce"]).item() == pytest.approx(1.12838, rel=1e-4)
    assert with_one["loss_bbox"].item() == pytest.approx(0, abs=1e-6)
    assert with_one["loss_giou"].item() == pytest.approx(0, abs=1e-6)
    plus = {"logits": torch.zeros(1, 300, 80), "boxes": torch.full((1, 300, 4), 0.5)}
    no = VarifocalCriterion()(plus, none)["loss_vfl"].item()
    assert no == pytest.approx(3119.16, rel=1e-5)
    yes = VarifocalCriterion()(plus, one)["loss_vfl"].item()
    assert yes - no == pytest.approx(math.log(2) - 0.75 * 0.25 * math.log(2), rel=1e-2)


@pytest.mark.parametrize(
    ("second", "iou", "giou"),
    [
        ([0, 0, 1, 1], 1.0, 1.0),
        ([1, 0, 2, 1], 0.0, 0.0),
        ([2, 0, 3, 1], 0.0, -1 / 3),
        ([0, 0, 2, 1], 0.5, 0.5),
    ],
)
def test_iou_of_squares(second, iou, giou):
    found = iou_and_giou(torch.tensor([0.0, 0, 1, 1]), torch.tensor(second, dtype=torch.float32))
    assert [value.item() for value in found] == pytest.approx([iou, giou], abs=1e-6)


def test_a_box_without_area_gives_finite_values_and_gradients():
    box = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    for values in (iou_and_giou(box, box), iou_and_giou(box, torch.tensor([0.1, 0.1, 0.2, 0.2]))):
        assert all(value.isfinite() for value in values)
        sum(values).backward()
        assert box.grad.isfinite().all()


def test_normalised_boxes_use_their_own_image():
    boxes = normalised(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([80, 40]))
    assert boxes[0].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])


# Matching


def random_case(images=3, layers=2, queries=12, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, images, queries, classes, generator=generator)
    boxes = torch.rand(layers, images, queries, 4, generator=generator) * 0.5 + 0.1
    labels = [torch.randint(0, classes, (n,), generator=generator) for n in (4, 0, 2)]
    objects = [torch.rand(n, 4, generator=generator) * 0.5 + 0.1 for n in (4, 0, 2)]
    return logits, boxes, labels, objects


def test_padded_objects_never_match_and_the_order_of_objects_is_nothing():
    logits, boxes, labels, objects = random_case()
    targets = pad_targets(labels, objects, 5)
    assignment = assign(assignment_costs(logits, boxes, targets, (1, 5, 2)), targets.counts)
    assert [(assignment.image == i).sum().item() for i in range(3)] == [8, 0, 4]
    order = torch.tensor([2, 0, 3, 1])
    labels[0], objects[0] = labels[0][order], objects[0][order]
    moved = pad_targets(labels, objects, 5)
    again = assign(assignment_costs(logits, boxes, moved, (1, 5, 2)), moved.counts)
    first = assignment.image == 0
    before = dict(
        zip(assignment.object[first][:4].tolist(), assignment.query[first][:4].tolist(), strict=True)
    )
    after = dict(zip(again.object[first][:4].tolist(), again.query[first][:4].tolist(), strict=True))
    assert {order[place].item(): query for place, query in after.items()} == before
    outputs = {"logits": logits[-1], "boxes": boxes[-1]}
    for kind in (FocalCriterion, VarifocalCriterion):
        one, two = kind()(outputs, targets), kind()(outputs, moved)
        assert all(one[name].item() == pytest.approx(two[name].item(), rel=1e-5) for name in one)


def test_more_objects_than_queries_match_all_queries():
    generator = torch.Generator().manual_seed(1)
    targets = pad_targets(
        [torch.zeros(9, dtype=torch.int64)], [torch.rand(9, 4, generator=generator) + 0.1], 2
    )
    outputs = {
        "logits": torch.randn(1, 4, 2, generator=generator),
        "boxes": torch.rand(1, 4, 4, generator=generator),
    }
    assignment = FocalCriterion().assign(outputs, targets)
    assert sorted(assignment.query.tolist()) == [0, 1, 2, 3]
    assert assignment_errors(outputs["logits"], targets, assignment)["class_error"].isfinite()


def test_a_diverged_network_is_reported_by_its_losses_and_not_by_the_matching():
    logits, boxes, labels, objects = random_case()
    logits[:] = float("nan")
    targets = pad_targets(labels, objects, 5)
    terms = FocalCriterion()({"logits": logits[0], "boxes": boxes[0]}, targets)
    assert terms["loss_ce"].isnan()
    assert terms["loss_bbox"].isfinite()


def test_a_batch_without_objects_keeps_a_gradient_path():
    boxes = torch.rand(2, 6, 4, requires_grad=True)
    outputs = {"logits": torch.zeros(2, 6, 3, requires_grad=True), "boxes": boxes}
    none = pad_targets([torch.empty(0, dtype=torch.int64)] * 2, [torch.empty(0, 4)] * 2, 3)
    for kind in (FocalCriterion, VarifocalCriterion):
        sum(kind()(outputs, none).values()).backward()
    assert boxes.grad is not None
    assert boxes.grad.abs().sum() == 0


def test_labels_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"\[0, 3\).*this batch has -1, 3"):
        pad_targets([torch.tensor([3, 1]), torch.tensor([-1])], [torch.rand(2, 4), torch.rand(1, 4)], 3)


def test_auxiliary_layers_can_be_left_out():
    logits, boxes, labels, objects = random_case()
    outputs = {"logits": logits[1], "boxes": boxes[1], "aux_logits": logits[:1], "aux_boxes": boxes[:1]}
    targets = pad_targets(labels, objects, 5)
    assert len(FocalCriterion()(outputs, targets)) == 6
    assert set(FocalCriterion(auxiliary=False)(outputs, targets)) == {"loss_ce", "loss_bbox", "loss_giou"}
