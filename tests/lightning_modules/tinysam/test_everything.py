"""Everything mode: SAM's small functions, the two rounds, and segment_anything's generator as the oracle."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from lightning_modules.tinysam.amg import (
    crop_boxes,
    mask_boxes,
    near_edge,
    point_grid,
    remove_small_regions,
    rle_counts,
    stability_scores,
)
from lightning_modules.tinysam.everything import Everything, MaskGenerator, fine_points
from lightning_modules.tinysam.network import SAM, TinyViT
from lightning_modules.tinysam.predictor import Predictor
from tests.golden.fill import fill, inputs
from tests.lightning_modules.tinysam.tiny import recorded


def shape_mask(height, width, shapes):
    ys, xs = np.mgrid[:height, :width]
    covered = np.zeros((height, width), bool)
    for kind, *numbers in shapes:
        if kind == "rect":
            x0, y0, x1, y1 = numbers
            covered |= (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)
        else:
            cx, cy, r = numbers
            covered |= (xs - cx) ** 2 + (ys - cy) ** 2 < r**2
    return covered


def test_small_functions_are_the_recorded_ones():
    case = recorded("amg")
    count, height, width = case["n"], case["H"], case["W"]
    logits = inputs(case["tag"] + "/logits", (count, height, width)) * 3
    masks = (logits > 0).numpy()
    masks[count - 1], masks[count - 2] = False, True
    counts = [rle_counts(mask) for mask in masks]
    assert [len(runs) for runs in counts] == case["rle_counts_len"]
    assert [runs[:10] for runs in counts] == case["rle_counts_first10"]
    assert masks.sum(axis=(1, 2)).tolist() == case["area"]
    for mask, runs in zip(masks, counts, strict=True):
        compressed = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        assert np.array_equal(coco_mask.decode(compressed), mask)
    assert mask_boxes(masks).tolist() == case["boxes_random"]
    blocks = np.zeros((3, height, width), bool)
    blocks[0, 3:7, 5:11] = True
    blocks[1, -1, -1] = True
    assert mask_boxes(blocks).tolist() == case["boxes_blocks"]
    stability = stability_scores(logits[: count - 1], 0.0, 1.0)
    np.testing.assert_allclose(stability, case["stability"], rtol=1e-5)
    assert stability_scores(torch.full((1, 2, 2), -9.0), 0, 1).item() == 0
    for side, points in case["grid"].items():
        grid = point_grid(int(side))
        assert len(grid) == points["n"]
        assert [grid[0].tolist(), grid[min(1, len(grid) - 1)].tolist(), grid[-1].tolist()] == [
            points["first"],
            points["second"],
            points["last"],
        ]
    for crop in case["crops"]:
        boxes, layers = crop_boxes(crop["h"], crop["w"], crop["n_layers"], 512 / 1500)
        assert boxes == crop["boxes"]
        assert layers == crop["layer"]
    edge = case["near_edge"]
    offset = np.array(edge["crop"][:2] * 2)
    assert near_edge(np.array(edge["boxes"]) + offset, edge["crop"], edge["image"]).tolist() == edge["near"]
    whole = near_edge(np.array(edge["boxes"]) + offset, edge["image"], edge["image"]).tolist()
    assert whole == edge["near_when_crop_is_image"]


def test_small_regions_are_the_recorded_ones():
    case = recorded("amg")["small_regions"]
    mask = np.zeros((30, 40), bool)
    mask[2:20, 2:30] = True
    mask[5:7, 5:8] = mask[10:16, 10:16] = False
    mask[25:27, 35:38] = True
    assert mask.sum() == case["start"]
    filled, changed = remove_small_regions(mask, 10, "holes")
    assert (int(filled.sum()), changed) == (case["after_holes"], case["changed_holes"])
    left, changed = remove_small_regions(filled, 10, "islands")
    assert (int(left.sum()), changed) == (case["after_islands"], case["changed_islands"])
    largest, _ = remove_small_regions(left, 10_000, "islands")
    assert largest.sum() == left.sum()
    assert remove_small_regions(np.zeros((3, 3), bool), 5, "islands")[1] is False


@pytest.mark.parametrize("case", recorded("hierarchical"), ids=lambda case: f"{case['W']}x{case['H']}")
def test_points_of_the_second_round_are_the_recorded_ones(case):
    height, width, side = case["H"], case["W"], case["points_per_side"]
    covered = shape_mask(height, width, case["covered"])
    coarse = point_grid(side // 4) * [width, height]
    assert len(coarse) == case["first_round"]
    points = fine_points(coarse, covered, side)
    assert len(points) == case["second_round"]
    if not len(points):
        return
    normalised = points / [width, height]
    np.testing.assert_allclose(normalised[:6], case["first6_normalized"], atol=1e-6)
    np.testing.assert_allclose(normalised[-3:], case["last3_normalized"], atol=1e-6)
    np.testing.assert_allclose(points.sum(axis=0), [case["sum_x_px"], case["sum_y_px"]], rtol=1e-6)
    assert points.min(axis=0).tolist() == pytest.approx(case["min_px"])
    assert points.max(axis=0).tolist() == pytest.approx(case["max_px"])
    assert len(np.unique(points, axis=0)) == case["unique"]


class Analytic(MaskGenerator):
    """Discs in place of a network."""

    def __init__(self, discs, options):
        super().__init__(SAM(64, TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2))), options)
        self.discs = discs

    def _embed(self, image, crop):
        self.size = image.shape[:2]

    def _decoded(self, points):
        ys, xs = np.mgrid[: self.size[0], : self.size[1]]
        for row, (px, py) in enumerate(points):
            for k, (cx, cy, r) in enumerate(self.discs):
                if np.hypot(px - cx, py - cy) < r:
                    logits = np.clip(4 * (r - np.hypot(xs - cx, ys - cy)), -20, 20).astype(np.float32)
                    iou = torch.tensor([0.95 - 0.001 * k])
                    yield torch.tensor([row]), iou, torch.from_numpy(logits)[None]
                    break


@pytest.mark.parametrize("rounds", [1, 2])
def test_discs_are_found_with_fewer_prompts(rounds):
    case = recorded("toy_everything")
    generator = Analytic(case["discs"], Everything(rounds=rounds, points_per_side=case["points_per_side"]))
    told = []
    records = generator.generate(
        np.zeros((case["H"], case["W"], 3), np.uint8), lambda *numbers: told.append(numbers)
    )
    kind = "original" if rounds == 1 else "hierarchical"
    assert generator.prompts == case[f"prompts_{kind}"]
    assert told[-1] == (generator.prompts, generator.prompts)
    found = [[r["area"], r["predicted_iou"], r["stability_score"], r["bbox"]] for r in records]
    found.sort(key=lambda record: -record[0])
    for ours, theirs in zip(found, case[f"masks_{kind}"], strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:3] == pytest.approx(theirs[1:3], abs=1e-5)
        assert ours[3] == theirs[3]


def test_what_the_second_round_finds_may_leave_out_its_points():
    """Two discs between the points of the first round: each is found once, by fewer prompts."""
    image, told, found = np.zeros((64, 64, 3), np.uint8), [], {}
    for prune in ("first", "running"):
        options = Everything(points_per_side=16, points_per_batch=8, prune=prune, stability_score_thresh=0.7)
        generator = Analytic([(16, 16, 8), (48, 32, 7)], options)
        records = generator.generate(image, lambda *numbers: told.append(numbers))
        found[prune] = generator.prompts, sorted(record["area"] for record in records)
        assert told[-1] == (generator.prompts, generator.prompts)
    assert found["running"][1] == found["first"][1]
    assert found["running"][0] <= found["first"][0] - 10
    assert len(found["first"][1]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points_per_side": 0}, "points_per_side=0: it must be at least 1"),
        ({"crop_n_layers": 1}, "crops go with the full grid"),
        ({"coarse_points_per_side": 40}, r"coarse_points_per_side=40: it must be in \[1, 32\]"),
        ({"rounds": 1, "crop_n_layers": -1}, "crop_n_layers=-1: it must be at least 0"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        Everything(**options)


def test_a_picture_smaller_than_the_grid_is_refused():
    generator = Analytic([], Everything())
    with pytest.raises(ValueError, match="a picture of 20 x 90 pixels has no room for 32 points"):
        generator.generate(np.zeros((90, 20, 3), np.uint8))


@pytest.fixture(scope="module")
def pair():
    """Ours and segment_anything's, small, with equal weights and an encoder of their own."""
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(3)
    encoder = TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), width=32)
    encoder.img_size = 128
    ours = fill(SAM(128, encoder, width=32, hidden=32)).eval()
    with torch.no_grad():  # random logits are near 0, where no mask is stable
        for mlp in ours.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[2].weight.mul_(60)
            mlp.layers[2].bias.mul_(60)
    theirs = Sam(
        encoder,
        PromptEncoder(32, (8, 8), (128, 128), 16),
        MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=32, num_heads=8),
            iou_head_hidden_dim=32,
        ),
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


@pytest.mark.parametrize("crops", [0, 1])
def test_segment_anything_finds_the_same_masks(pair, crops):
    from segment_anything import SamAutomaticMaskGenerator

    ours, theirs = pair
    image = np.random.RandomState(5).randint(0, 256, size=(60, 80, 3), dtype=np.uint8)
    options = {
        "points_per_side": 6,
        "pred_iou_thresh": -1.0,
        "stability_score_thresh": 0.6,
        "box_nms_thresh": 1.0,
        "crop_n_layers": crops,
        "crop_nms_thresh": 1.0,
    }
    found = MaskGenerator(ours, Everything(rounds=1, **options)).generate(image)
    expected = SamAutomaticMaskGenerator(theirs, **options).generate(image)
    assert len(expected) > 3
    assert len(found) == len(expected)
    for mine, record in zip(found, expected, strict=True):
        assert mine["predicted_iou"] == pytest.approx(record["predicted_iou"], abs=1e-4)
        assert mine["stability_score"] == pytest.approx(record["stability_score"], abs=1e-2)
        assert mine["point_coords"][0] == pytest.approx(record["point_coords"][0])
        assert mine["crop_box"] == record["crop_box"]
        assert (mine["segmentation"] != record["segmentation"]).mean() < 1e-3


def test_run_lengths_are_the_masks(pair):
    ours, _ = pair
    image = np.random.RandomState(5).randint(0, 256, size=(60, 80, 3), dtype=np.uint8)
    options = {
        "rounds": 1,
        "points_per_side": 4,
        "pred_iou_thresh": -1.0,
        "stability_score_thresh": 0.6,
        "box_nms_thresh": 1.0,
    }
    masks, runs, compressed = (
        MaskGenerator(ours, Everything(output=form, **options)).generate(image)
        for form in ("binary_mask", "uncompressed_rle", "coco_rle")
    )
    assert len(masks) > 1
    for mask, run, coco in zip(masks, runs, compressed, strict=True):
        assert sum(run["segmentation"]["counts"]) == mask["segmentation"].size
        assert run["segmentation"]["counts"] == rle_counts(mask["segmentation"])
        decoded = coco_mask.decode(
            {**coco["segmentation"], "counts": coco["segmentation"]["counts"].encode()}
        )
        assert np.array_equal(decoded, mask["segmentation"])
    tidy = MaskGenerator(ours, Everything(min_mask_region_area=30, **options)).generate(image)
    assert 0 < len(tidy) <= len(masks)
    assert Predictor(ours).original is None
