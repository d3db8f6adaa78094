"""Everything mode against the recorded points and masks, and at its edges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.tinysam import Everything, Protocol
from lightning_modules.tinysam.everything import fine_points, generate, grid

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tinysam.json").read_text())


def covered(case):
    y, x = np.mgrid[0 : case["H"], 0 : case["W"]]
    sure = np.zeros((case["H"], case["W"]), bool)
    for kind, *numbers in case["covered"]:
        if kind == "rect":
            x0, y0, x1, y1 = numbers
            sure[y0:y1, x0:x1] = True
        else:
            cx, cy, radius = numbers
            sure |= (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    return sure


@pytest.mark.parametrize("case", GOLDEN["hierarchical"], ids=lambda case: f"{case['H']}x{case['W']}")
def test_recorded_points(case):
    size, sure = torch.tensor([case["W"], case["H"]]), covered(case)
    assert sure.sum() == case["covered_pixels"]
    count = case["points_per_side"]
    coarse = grid(count // 4) * size
    points = fine_points(coarse, sure, count)
    assert (len(coarse), len(points)) == (case["first_round"], case["second_round"])
    if len(points):
        normalised = points / size
        assert normalised[:6].tolist() == [pytest.approx(p) for p in case["first6_normalized"]]
        assert normalised[-3:].tolist() == [pytest.approx(p) for p in case["last3_normalized"]]
        sums = points.sum(dim=0).tolist()
        assert sums == [pytest.approx(case["sum_x_px"]), pytest.approx(case["sum_y_px"])]
        assert len(points.unique(dim=0)) == case["unique"]


class Discs:
    """An analytic segmenter."""

    def __init__(self, case):
        self.case, self.asked = case, 0

    def __call__(self, points):
        self.asked += len(points)
        y, x = torch.meshgrid(torch.arange(self.case["H"]), torch.arange(self.case["W"]), indexing="ij")
        logits = torch.full((len(points), 3, *x.shape), -20.0)
        iou = torch.full((len(points), 3), 0.3)
        for row, (px, py) in enumerate(points.tolist()):
            for number, (cx, cy, radius) in enumerate(self.case["discs"]):
                if np.hypot(px - cx, py - cy) < radius:
                    distance = torch.hypot((x - cx).float(), (y - cy).float())
                    logits[row, 2] = (4 * (radius - distance)).clamp(-20, 20)
                    iou[row, 2] = 0.95 - 0.001 * number
                    break
        return logits, iou


@pytest.mark.parametrize(("mode", "key"), [("hierarchical", "hierarchical"), ("grid", "original")])
def test_recorded_masks(mode, key):
    case = GOLDEN["toy_everything"]
    ask = Discs(case)
    found = generate(ask, case["H"], case["W"], Everything(mode))
    assert ask.asked == case[f"prompts_{key}"]
    areas = sorted(found.masks.sum(axis=(1, 2)).tolist(), reverse=True)
    assert areas == [row[0] for row in case[f"masks_{key}"]]
    ious = sorted(found.iou.tolist())
    assert ious == [pytest.approx(v, abs=1e-6) for v in sorted(row[1] for row in case[f"masks_{key}"])]


def test_nothing_left_for_the_second_round():
    """All is sure at once: the release crashes."""

    def everywhere(points):
        return torch.full((len(points), 1, 64, 64), 20.0), torch.full((len(points), 1), 0.99)

    found = generate(everywhere, 64, 64, Everything())
    assert found.masks.shape == (1, 64, 64)


def test_nothing_found():
    def nothing(points):
        return torch.full((len(points), 3, 40, 50), -5.0), torch.full((len(points), 3), 0.9)

    assert generate(nothing, 40, 50, Everything()).masks.shape == (0, 40, 50)
    with pytest.raises(ValueError, match="a picture of 20 x 40 pixels has no 32 points a side"):
        generate(
            lambda points: (torch.zeros(len(points), 1, 40, 20), torch.ones(len(points), 1)),
            40,
            20,
            Everything(),
        )
    with pytest.raises(ValueError, match="are at least 1"):
        Everything(points_per_side=0)


def test_recall_is_measured(student, data, trainer):
    options = Everything(points_per_side=4, min_iou=-9.0, min_stability=0.0)
    module = student(protocol=Protocol("everything", everything=options))
    scores = trainer().test(module, data(val_masks=3), verbose=False)[0]
    names = ("recall50", "recall75", "miou", "masks", "seconds")
    assert set(scores) == {f"test/{name}" for name in names}
    assert scores["test/recall75"] <= scores["test/recall50"] <= 1
    assert scores["test/masks"] > 0
