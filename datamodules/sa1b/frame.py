"""The square that promptable segmenters see: the longer side resized to it, the rest of it padding."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.reading import CorruptSampleError

STRIDE = 4
"""Pixels of the frame for one of a low-resolution mask."""


def frame_size(height: int, width: int, frame: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side is resized to `frame`, rounded half up as SAM does.

    Raises:
        ValueError: a side would become 0.
    """
    scale = frame / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if 0 in size:
        raise ValueError(f"is {width} x {height} pixels: its shorter side vanishes at {frame} pixels")
    return size


def framed(picture: Image.Image, frame: int, path: str) -> tuple[Tensor, Tensor]:
    """A picture as uint8 (3, frame, frame), black right and below of it, and its height and width there.

    Args:
        picture: RGB.
        frame: side, pixels.
        path: of its file, for the error.

    Raises:
        CorruptSampleError: it is so narrow that nothing of it would be left.
    """
    try:
        height, width = frame_size(picture.height, picture.width, frame)
    except ValueError as error:
        raise CorruptSampleError(f"{path} {error}") from None
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    image = torch.zeros(3, frame, frame, dtype=torch.uint8)
    image[:, :height, :width] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return image, torch.tensor([height, width])


def low_resolution(mask: NDArray[np.bool_], frame: int) -> NDArray[np.bool_]:
    """A mask of a picture as target of the decoder, (frame / 4, frame / 4).

    It is resized and padded as the picture is, by Pillow, then averaged over 4 x 4 pixels; what is covered
    by more than half is set. (Nearest neighbours differ between Pillow, OpenCV and torchvision.)
    """
    height, width = frame_size(mask.shape[0], mask.shape[1], frame)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    side = frame // STRIDE
    if not len(rows):
        return np.zeros((side, side), np.bool_)
    top, bottom = _reach(rows, mask.shape[0], height)
    left, right = _reach(columns, mask.shape[1], width)
    # only where the mask is, as the rest is 0; the box is the part of the picture that these pixels come from
    vertical, horizontal = mask.shape[0] / height, mask.shape[1] / width
    box = (left * horizontal, top * vertical, right * horizontal, bottom * vertical)
    grey = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    size = right - left, bottom - top
    cover = np.zeros((frame, frame), np.uint16)
    cover[top:bottom, left:right] = np.asarray(grey.resize(size, Image.Resampling.BILINEAR, box))
    across = cover[:, 0::4] + cover[:, 1::4] + cover[:, 2::4] + cover[:, 3::4]
    return across[0::4] + across[1::4] + across[2::4] + across[3::4] > 255 * STRIDE**2 // 2


def _reach(places: NDArray[np.int64], length: int, size: int) -> tuple[int, int]:
    """First and last pixel of a side of `size` that a filter over some of `length` reaches, with a margin."""
    first, last = int(places[0]) * size / length, (int(places[-1]) + 1) * size / length
    return max(0, int(first) - 3), min(size, int(last) + 4)


def collate_frames(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch: tensors of one size are stacked, what differs in length is joined or listed.

    `image` becomes float32 (B, 3, S, S) in [0, 1]; `masks` (N, S/4, S/4), those of all images, with `owner`
    (N,), the place of each one's image; `embedding` (C, ...) of the images that have one, and `cached` (B,)
    says which. All other fields that are not tensors, arrays or numbers of one kind are lists.
    """
    stacked = ("image", "size", "orig_size", "index")
    batch = default_collate([{name: sample[name] for name in stacked} for sample in samples])
    batch["image"] = batch["image"].float().div_(255)
    if "masks" in samples[0]:
        counts = torch.tensor([len(sample["masks"]) for sample in samples])
        batch["masks"] = torch.cat([sample["masks"] for sample in samples])
        batch["owner"] = torch.repeat_interleave(torch.arange(len(samples)), counts)
    cached = [sample["embedding"] for sample in samples if sample.get("embedding") is not None]
    if cached:
        batch["embedding"] = torch.stack(cached)
        batch["cached"] = torch.tensor([sample.get("embedding") is not None for sample in samples])
    done = {*stacked, "masks", "embedding"}
    return batch | {name: [sample[name] for sample in samples] for name in samples[0] if name not in done}
