"""Points drawn from masks, hard ones above all, and boxes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from lightning_modules.tinysam import prompts


def discs(count=40, side=32, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side]
    found = []
    for _ in range(count):
        radius, centre = rng.uniform(6, 12), rng.uniform(10, side - 10, 2)
        found.append((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2)
    return torch.from_numpy(np.stack(found))


def cells(points):
    """Low-resolution pixels of points of the frame."""
    place = ((points[:, 0] - 1.5) / 4).round().long()
    return place[:, 0], place[:, 1]


def test_points_are_uniform_over_the_mask():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, :3] = True
    drawn = torch.cat([prompts.draw_points(mask) for _ in range(600)])[:, 0]
    assert drawn[:, 1].unique().tolist() == [5.5]
    values, counts = drawn[:, 0].unique(return_counts=True)
    assert values.tolist() == [1.5, 5.5, 9.5]  # +0.5 of the prompt encoder makes them centres of 4 x 4 pixels
    assert counts.min() > 150


def test_a_hard_point_lies_where_the_last_mask_misses():
    masks, asked = discs(), []

    def decode(points):
        asked.append(points)
        x, _ = cells(points)
        left = torch.arange(masks.shape[2]) < x[:, None]  # what lies left of the point is found
        logits = torch.where(masks & left[:, None], 1.0, -1.0)
        return torch.stack([-logits, logits], dim=1), torch.tensor([[0.1, 0.9]]).expand(len(masks), 2)

    points = prompts.hard_points(masks, 3, decode)
    assert len(asked) == 3
    for before, after in zip(asked, [*asked[1:], points], strict=True):
        x, y = cells(after)
        assert masks[torch.arange(len(masks)), y, x].all()
        assert (after[:, 0, 0] >= before[:, 0, 0]).all()  # not in the part that was found


def test_where_nothing_is_missed_the_point_stays():
    masks = discs(4)
    everything = torch.ones(4, 1, *masks.shape[1:]), torch.ones(4, 1)
    torch.manual_seed(3)
    first = prompts.draw_points(masks)
    torch.manual_seed(3)
    assert torch.equal(prompts.hard_points(masks, 5, lambda _: everything), first)


def test_hard_points_lie_nearer_the_border():
    """A student that gives the mask eroded by a pixel, within a disc around the prompt."""
    masks = discs(60)
    eroded = torch.from_numpy(np.stack([binary_erosion(mask, iterations=1) for mask in masks.numpy()]))
    y, x = torch.meshgrid(*(torch.arange(32),) * 2, indexing="ij")

    def decode(points):
        column, row = (place[:, None, None] for place in cells(points))
        near = (x - column) ** 2 + (y - row) ** 2 < 9**2
        return torch.where(eroded & near, 1.0, -1.0)[:, None], torch.ones(len(points), 1)

    depth = torch.from_numpy(np.stack([distance_transform_edt(mask) for mask in masks.numpy()]))
    depth = depth / depth.amax(dim=(1, 2), keepdim=True)

    def mean_depth(rounds):
        column, row = cells(prompts.hard_points(masks, rounds, decode))
        return depth[torch.arange(len(masks)), row, column].mean().item()

    easy, hard = mean_depth(0), np.mean([mean_depth(rounds) for rounds in (1, 2, 3)])
    assert hard < 0.8 * easy


def test_boxes_have_the_outer_edges():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 3:6] = True
    masks[1, 7, 7] = True
    assert prompts.boxes_of(masks).tolist() == [[12, 8, 24, 16], [28, 28, 32, 32]]


def test_noise_of_boxes_is_bounded():
    masks = torch.zeros(200, 64, 64, dtype=torch.bool)
    masks[:, 2:62, 10:14] = True
    boxes, exact = prompts.noisy_boxes(masks), prompts.boxes_of(masks)
    noise = (boxes - exact).abs()
    assert noise[:, [1, 3]].max() <= 20 + 1e-4  # a tenth of 240 pixels is more
    assert noise[:, [0, 2]].std() < 2.5  # a tenth of 16
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 256


def test_the_best_mask_is_that_of_the_highest_predicted_iou():
    logits = torch.arange(2 * 3.0).reshape(2, 3, 1, 1)
    assert prompts.best_mask(logits, torch.tensor([[0.1, 0.9, 0.2], [3.0, 2.0, 1.0]])).flatten().tolist() == [
        1,
        3,
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_draws_are_those_of_the_seed(seed):
    masks = discs(5)
    draws = []
    for _ in range(2):
        torch.manual_seed(seed)
        draws.append(prompts.hard_points(masks, 0, lambda points: (points, points)))
    assert torch.equal(*draws)
