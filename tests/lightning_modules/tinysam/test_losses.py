"""TinySAM's losses against the recorded numbers, and what their formulas promise."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_modules.tinysam import losses
from tests.golden.fill import inputs

CASES = json.loads((Path(__file__).parents[2] / "golden" / "tinysam.json").read_text())["losses"]


def tensors(case):
    count, kinds, side, tag = case["N"], case["K"], case["hw"], case["tag"]
    teacher, student = (inputs(f"{tag}/{which}", (count, kinds, side, side)).double() * 3 for which in "TS")
    student[0] = teacher[0]
    found = {"teacher": teacher, "student": student, "truth": inputs(f"{tag}/G", (count, side, side)) > 0.2}
    for name, shape in (("e", (1, 256, 4, 4)), ("t", (count, 5, 256))):
        found |= {name + which: inputs(f"{tag}/{name}{which}", shape).double() for which in "TS"}
    return {**found, "iou": inputs(f"{tag}/iou", (count, kinds)).double() * 0.2 + 0.5}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tag"])
def test_recorded_losses(case):
    given = tensors(case)
    teacher, student, truth = given["teacher"], given["student"], given["truth"]
    ious = [losses.mask_iou(masks, truth).amax(dim=1) for masks in (teacher, student)]
    hardness = losses.hard_mask_weight(*ious, eps=case["eps"])
    per_mask = losses.output_loss(student, teacher)
    embedding, token = (losses.mean_distance(given[n + "S"], given[n + "T"]) for n in "et")
    focal, dice = losses.focal_loss(student, truth), losses.dice_loss(student, truth)
    mask = losses.mask_loss(student, truth)
    iou = losses.iou_loss(given["iou"], student, truth)
    fixed = case["alpha"] * embedding + case["beta"] * token
    hard = fixed + case["gamma"] * losses.reduced(hardness * per_mask)
    found = {
        "iou_teacher": ious[0],
        "iou_student": ious[1],
        "hardness": hardness,
        "L_embedding": embedding,
        "L_token": token,
        "L_output_per_mask": per_mask,
        "focal": focal,
        "dice": dice,
        "L_mask": losses.reduced(mask),
        "L_iou": iou,
        "L_distill_unweighted": fixed + case["gamma"] * losses.reduced(per_mask),
        "L_distill_hard_mask": hard,
        "L_total": hard + mask.mean() + iou,
    }
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            torch.tensor(case[name]).double(),
            rtol=1e-6,
            atol=1e-6,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    assert (losses.FOCAL_WEIGHT * focal + dice).argmin(dim=1).tolist() == case["best"]


def test_hard_masks_weigh_more():
    def weight(teacher, student):
        return losses.hard_mask_weight(torch.tensor([teacher]), torch.tensor([student])).item()

    assert weight(0.7, 0.7) == pytest.approx(0.5, abs=1e-6)
    assert weight(0.0, 0.5) == pytest.approx(1 / (1 + math.e))
    assert weight(0.5, 0.0) == 1
    assert weight(0.8, 0.5) > weight(0.6, 0.5) > weight(0.6, 0.7)


def test_distillation_is_zero_where_nothing_is_to_learn():
    given = tensors(CASES[0])
    same = given["teacher"]
    assert losses.output_loss(same, same).abs().max() == 0
    assert losses.mean_distance(same, same) == 0
    assert losses.mask_loss(same, given["truth"]).min() > 0
    assert losses.iou_loss(given["iou"], same, given["truth"]) > 0


def test_only_the_best_mask_learns_from_the_truth():
    given = tensors(CASES[0])
    student = given["student"].clone().requires_grad_()
    losses.mask_loss(student, given["truth"]).sum().backward()
    learns = student.grad.abs().sum(dim=(-2, -1)) > 0
    assert learns.sum(dim=1).tolist() == [1] * len(student)
    assert learns.int().argmax(dim=1).tolist() == CASES[0]["best"]


def test_the_padding_counts_nowhere():
    given = tensors(CASES[0])
    valid = torch.zeros_like(given["truth"])
    valid[:, :5, :6] = True
    cut = [given[name][..., :5, :6] for name in ("student", "teacher", "truth")]
    student, teacher, truth = given["student"], given["teacher"], given["truth"]
    pairs = [
        (losses.output_loss(student, teacher, valid), losses.output_loss(*cut[:2])),
        (
            losses.output_loss(student, teacher, valid, "bce_dice"),
            losses.output_loss(*cut[:2], kind="bce_dice"),
        ),
        (losses.focal_loss(student, truth, valid), losses.focal_loss(cut[0], cut[2])),
        (losses.dice_loss(student, truth, valid), losses.dice_loss(cut[0], cut[2])),
        (losses.mask_iou(student, truth, valid), losses.mask_iou(cut[0], cut[2])),
    ]
    for whole, part in pairs:
        torch.testing.assert_close(whole, part)


def test_masks_without_area_give_numbers():
    logits = torch.full((2, 3, 4, 4), -1.0, requires_grad=True)
    truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    ious = losses.mask_iou(logits, truth)
    loss = losses.mask_loss(logits, truth).mean() + losses.iou_loss(torch.rand(2, 3), logits, truth)
    loss = (
        loss + (losses.hard_mask_weight(ious[:, 0], ious[:, 1]) * losses.output_loss(logits, -logits)).sum()
    )
    loss.backward()
    assert ious.tolist() == [[0.0] * 3] * 2
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_reductions():
    values = torch.tensor([1.0, 3.0])
    assert losses.reduced(values) == 2
    assert losses.reduced(values, "sum") == 4
    assert losses.reduced(values[:0]) == 0  # no prompt


def test_half_precision_is_computed_in_float32():
    given = tensors(CASES[0])
    student, teacher = given["student"].half(), given["teacher"].half()
    assert losses.output_loss(student, teacher).dtype == torch.float32
    assert losses.mask_loss(student, given["truth"]).dtype == torch.float32
