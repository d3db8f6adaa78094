"""Pictures of what became of the patches of an image: kept, merged or dropped."""

import colorsys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.token_reduction.state import BlockRecord
from callbacks.writers.drawing import contact_sheet

if TYPE_CHECKING:
    from PIL import Image

SIDE = 224  # pixels of a panel, about


def patch_groups(sources: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """The token that each patch of an image is part of.

    Args:
        sources: (tokens, input tokens) 0 or 1, see `BlockRecord`.
        grid: patches (down, across).
        prefix: leading input tokens that are not patches.

    Returns:
        (down, across) position of the token, -1 where the patch was dropped.
    """
    patches = sources[:, prefix:]
    owner = patches.argmax(dim=0)
    return torch.where(patches.amax(dim=0) > 0, owner, -1).view(grid)


def paint_groups(image: Tensor, groups: Tensor) -> Tensor:
    """An image as its tokens see it.

    A patch that is a token of its own is shown as it is; patches that were merged are painted in their mean
    colour and outlined, in one outline colour a token; dropped patches are black.

    Args:
        image: (3, height, width) in [0, 1], any size that the grid divides.
        groups: (down, across), see `patch_groups`.

    Returns:
        (3, height, width), small images enlarged by a whole number.
    """
    factor = max(1, round(SIDE / max(image.shape[1:])))
    image = image.detach().float().cpu().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    groups = groups.cpu()
    height, width = (length // count for length, count in zip(image.shape[1:], groups.shape, strict=True))
    labels = groups.repeat_interleave(height, 0).repeat_interleave(width, 1)  # (height, width)
    counts = torch.bincount(groups.flatten() + 1)[groups + 1]
    merged = (counts > 1) & (groups >= 0)
    inside = merged.repeat_interleave(height, 0).repeat_interleave(width, 1)
    image = torch.where(inside, _group_means(image, labels), image)
    image = torch.where(labels < 0, torch.zeros_like(image), image)
    edges = inside & _border(labels, max(1, min(height, width) // 12))
    return torch.where(edges, _outline_colours(int(labels.max()) + 2)[:, labels + 1], image)


def draw_layers(
    image: Tensor, record: Mapping[int, BlockRecord], place: int, grid: tuple[int, int], prefix: int
) -> "Image.Image":
    """One panel for the image, and one for what is left of it after each compressing block.

    Args:
        image: (3, height, width) in [0, 1].
        record: `{block: BlockRecord}` of a traced forward pass.
        place: of the image in the recorded batch.
        grid: patches (down, across).
        prefix: tokens that are not patches.
    """
    panels, captions = [paint_groups(image, torch.arange(grid[0] * grid[1]).view(grid))], ["image"]
    for block, entry in record.items():
        if entry.sources is None:
            continue
        groups = patch_groups(entry.sources[place], grid, prefix)
        way = "" if entry.pooled is None else ", pooled" if bool(entry.pooled[place]) else ", pruned"
        panels.append(paint_groups(image, groups))
        captions.append(
            f"after block {block}{way}\n{entry.tokens} tokens, {int((groups < 0).sum())} patches dropped"
        )
    return contact_sheet(panels, captions, columns=min(4, len(panels)), side=SIDE)


def _group_means(image: Tensor, labels: Tensor) -> Tensor:
    """Each pixel replaced by the mean of the pixels of its label; labels start at -1."""
    flat = (labels + 1).flatten()
    sums = torch.zeros(image.shape[0], int(flat.max()) + 1).index_add_(1, flat, image.flatten(1))
    return (sums / torch.bincount(flat).clamp(min=1))[:, flat].view_as(image)


def _border(labels: Tensor, thickness: int) -> Tensor:
    """Pixels within `thickness` of another label or of the image's edge."""
    padded = F.pad(labels[None].float(), [thickness] * 4, value=-2.0)[0]
    height, width = labels.shape
    different = torch.zeros_like(labels, dtype=torch.bool)
    for down, across in ((0, 1), (2, 1), (1, 0), (1, 2)):
        top, left = down * thickness, across * thickness
        different |= padded[top : top + height, left : left + width] != labels
    return different


def _outline_colours(count: int) -> Tensor:
    """(3, count) bright colours, neighbours in the list far apart in hue."""
    colours = [colorsys.hsv_to_rgb(place * 0.618034 % 1, 0.9, 1.0) for place in range(count)]
    return torch.tensor(colours).T
