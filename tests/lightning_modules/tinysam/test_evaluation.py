"""Mask AP by COCO's and LVIS's rules, clicks, and recall of everything mode."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from scipy.ndimage import distance_transform_edt

from lightning_modules.tinysam import evaluation
from lightning_modules.tinysam.evaluation import MaskEvaluation, MeanOverMasks, PictureRecords

SIDE = 40


def square(left, top, side):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def runs(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def truth(mask, category=0, crowd=0):
    return {
        "segmentation": runs(mask),
        "area": int(mask.sum()),
        "iscrowd": crowd,
        "category_id": category,
        "bbox": [],
    }


def found(mask, score, category=0):
    return {"segmentation": runs(mask), "category_id": category, "score": score}


def measured(*pictures):
    collected = MaskEvaluation()
    for key, (detections, annotations, *lists) in enumerate(pictures):
        collected.update(key, PictureRecords((SIDE, SIDE), detections, annotations, *lists))
    return {name: round(value, 9) for name, value in collected.compute().items()}


A, B = square(2, 2, 12), square(20, 20, 14)


def test_perfect_masks():
    scores = measured(([found(A, 0.9), found(B, 0.8)], [truth(A), truth(B)]))
    assert scores == {"AP": 1, "AP50": 1, "AP75": 1, "APs": 1, "APm": -1, "APl": -1}


def test_half_of_a_mask_counts_at_low_thresholds_alone():
    half = A.copy()
    half[2:5] = False  # IoU 9 / 12
    scores = measured(([found(half, 0.9)], [truth(A)]))
    assert scores["AP50"] == scores["AP75"] == 1
    assert scores["AP"] == pytest.approx(6 / 10)  # 0.5, 0.55, ..., 0.75


def test_the_detectors_score_orders():
    right_first = measured(([found(A, 0.9), found(B, 0.2)], [truth(A)]))
    wrong_first = measured(([found(A, 0.2), found(B, 0.9)], [truth(A)]))
    assert right_first["AP"] == 1
    assert wrong_first["AP"] == pytest.approx(0.5)


def test_crowds_are_no_mistakes():
    assert measured(([found(B, 0.95), found(A, 0.9)], [truth(A), truth(B, crowd=1)]))["AP"] == 1


def test_nothing_there_and_nothing_found():
    assert set(measured(([found(A, 0.5)], [])).values()) == {-1.0}
    assert measured(([], [truth(A)]))["AP"] == 0
    assert set(MaskEvaluation().compute().values()) == {-1.0}


def test_a_picture_counts_once():
    collected = MaskEvaluation()
    for detections in ([found(A, 0.9)], []):
        collected.update(7, PictureRecords((SIDE, SIDE), detections, [truth(A)]))
    assert collected.compute()["AP"] == pytest.approx(1)


def test_lvis_counts_what_a_picture_is_annotated_for():
    """Of category 1 nothing is said in the first picture; in the second it is said not to be there."""
    wrong = found(B, 0.95, category=1)
    second = ([found(A, 0.5, 1)], [truth(A, 1)], [], [])
    assert measured(([wrong], [truth(A)], [], []), second)["AP"] == pytest.approx(0.5)  # of 0 and 1
    assert measured(([wrong], [truth(A)], [1], []), second)["AP"] == pytest.approx(0.25)
    assert measured(([wrong], [truth(A)]), ([found(A, 0.5, 1)], [truth(A, 1)]))["AP"] == pytest.approx(0.25)


def test_lvis_forgives_extra_masks_where_not_all_are_annotated():
    detections = [found(B, 0.9), found(A, 0.5)]
    assert measured((detections, [truth(A)], [], []))["AP"] == pytest.approx(0.5)
    assert measured((detections, [truth(A)], [], [0]))["AP"] == 1


def test_lvis_counts_300_masks():
    many = [found(B, 0.9)] * 300
    assert measured(([*many, found(A, 0.1)], [truth(A)], [], [0]))["AP"] == 0
    assert measured(([*many[1:], found(A, 0.1)], [truth(A)], [], [0]))["AP"] == 1


# clicks


def test_the_first_click_is_in_the_middle():
    masks = np.stack([square(10, 4, 9), square(0, 0, 7)])
    points, labels = evaluation.next_clicks(masks, np.zeros_like(masks))
    assert points.tolist() == [[14, 8], [3, 3]]  # the picture's border is a border, too
    assert labels.tolist() == [1, 1]


def test_a_click_corrects_the_larger_mistake():
    wanted = square(4, 4, 20)
    missing = wanted.copy()
    missing[4:13, 4:13] = False
    extra = wanted | square(25, 25, 7)
    points, labels = evaluation.next_clicks(
        np.stack([wanted] * 2), np.stack([missing | square(30, 30, 5), extra])
    )
    assert labels.tolist() == [1, 0]
    assert points.tolist() == [[8, 8], [28, 28]]


def test_a_click_is_as_deep_as_the_whole_distance_transform_says():
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = rng.random((SIDE, SIDE)) < 0.8
        points, _ = evaluation.next_clicks(mask[None], np.zeros_like(mask)[None])
        depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        x, y = points[0].long().tolist()
        assert depth[y, x] == depth.max()


def test_clicks_accumulate():
    wanted = np.stack([square(0, 0, 10), square(5, 5, 30)])
    asked = []

    def decode(points, labels):
        asked.append((points.shape, labels.shape))
        masks = np.zeros_like(wanted)
        for row, clicks in enumerate(points.long().tolist()):
            for x, y in clicks:
                masks[row, max(0, y - 4) : y + 5, max(0, x - 4) : x + 5] = True
        return masks & wanted

    ious = evaluation.ious_by_click(wanted, decode, 3)
    assert ious.shape == (2, 3)
    assert (np.diff(ious[1]) > 0).all()
    assert ious[0, 0] == pytest.approx(81 / 100)
    assert asked == [((2, k, 2), (2, k)) for k in (1, 2, 3)]
    assert evaluation.ious_by_click(wanted[:0], decode, 3).shape == (0, 3)


def test_a_perfect_mask_gets_a_click_all_the_same():
    points, labels = evaluation.next_clicks(A[None], A[None])
    assert labels.tolist() == [1]
    assert A[int(points[0, 1]), int(points[0, 0])]


# everything


def test_the_best_of_the_generated_masks_counts():
    quarter = square(2, 2, 6)
    ious = evaluation.best_ious([runs(A), runs(B)], [runs(quarter), runs(A)])
    assert ious.tolist() == [1, 0]
    assert evaluation.best_ious([runs(A)], []).tolist() == [0]
    assert evaluation.best_ious([], [runs(A)]).tolist() == []


def test_means_are_over_masks_not_pictures():
    means = MeanOverMasks()
    means.update(0, {"iou": np.array([1.0])})
    means.update(1, {"iou": np.array([0.0, 0.0, 0.0])})
    means.update(1, {"iou": np.array([1.0])})  # a sampler that fills up
    means.update(2, {"iou": np.zeros(0)})
    assert means.compute() == {"iou": 0.25}
    means.reset()
    assert means.compute() == {}


def test_empty_masks_have_no_nan():
    empty = np.zeros((1, 4, 4), bool)
    assert evaluation.paired_iou(empty, empty).tolist() == [0]
    assert torch.isfinite(torch.from_numpy(evaluation.paired_iou(empty, empty))).all()
