"""Masks of one picture: embedded once, prompted many times (section 2.4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_modules.tinysam.frame import MEAN, STD
from lightning_modules.tinysam.network import SAM


@dataclass(frozen=True)
class Masks:
    """What one prompt gave.

    Attributes:
        masks: bool (k, height, width), in the picture's own pixels.
        iou: predicted IoUs (k,).
        logits: (k, side / 4, side / 4), to be given back as `mask` of the next prompt.
    """

    masks: NDArray[np.bool_]
    iou: NDArray[np.float32]
    logits: NDArray[np.float32]

    @property
    def best(self) -> NDArray[np.bool_]:
        """The mask of the highest predicted IoU."""
        return self.masks[int(self.iou.argmax())]


def frame_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side becomes `side`.

    Raises:
        ValueError: the shorter side would vanish.
    """
    scale = side / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(size) < 1:
        raise ValueError(f"a picture of {width} x {height} pixels has no short side left at {side}.")
    return size


def to_frame(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (height, width, 3), resized so that its longer side is `side` (Pillow's bilinear).

    Raises:
        ValueError: it is no RGB picture of 8 bits, or a side vanishes.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"an image is uint8 of (height, width, 3), and this is {image.dtype} of {tuple(image.shape)}."
        )
    height, width = frame_size(image.shape[0], image.shape[1], side)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalised_frame(image: NDArray[np.uint8], side: int) -> Tensor:
    """What the encoder sees of a resized picture: (1, 3, side, side), zeros right of and below it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    pixels = (torch.from_numpy(image.copy()).permute(2, 0, 1).float() - mean) / std
    return F.pad(pixels, (0, side - image.shape[1], 0, side - image.shape[0]))[None]


def full_size(logits: Tensor, side: int, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Logits (n, k, s, s) of the frame, (n, k, height, width) of the picture.

    Args:
        logits: of the decoder.
        side: of the frame, pixels.
        size: height and width of the picture in it.
        original: height and width on disk.
    """
    frame = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
    return F.interpolate(frame[..., : size[0], : size[1]], original, mode="bilinear", align_corners=False)


class Predictor:
    """Masks of points, boxes and masks on one picture.

    Args:
        network: in eval mode while it predicts.
    """

    def __init__(self, network: SAM) -> None:
        self.network = network
        self.original: tuple[int, int] | None = None
        self.size = (0, 0)
        self.embedding = torch.empty(0)
        self.image_pe = torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return self.network.prompt_encoder.no_mask_embed.weight.device

    @torch.no_grad()
    def set_image(self, image: NDArray[np.uint8]) -> None:
        """Embed a picture, uint8 RGB (height, width, 3).

        Raises:
            ValueError: see `to_frame`.
        """
        resized = to_frame(image, self.network.image_size)
        self.network.eval()
        self.embedding = self.network.image_encoder(
            normalised_frame(resized, self.network.image_size).to(self.device)
        )
        self.set_embedding(self.embedding, image.shape[:2])

    def set_embedding(self, embedding: Tensor, original: tuple[int, ...]) -> None:
        """Take an embedding (1, width, h, w) that was made before, of a picture of `original` size."""
        self.original = int(original[0]), int(original[1])
        self.size = frame_size(*self.original, self.network.image_size)
        self.embedding = embedding
        self.image_pe = self.network.prompt_encoder.get_dense_pe()

    @torch.no_grad()
    def predict(
        self,
        points: Any = None,
        labels: Any = None,
        box: Any = None,
        mask: Any = None,
        multimask_output: bool = True,
    ) -> Masks:
        """Masks of one prompt, which may have points, a box and a mask together.

        Args:
            points: (k, 2) as x, y in the picture's pixels.
            labels: (k,): 1 is on the object, 0 beside it, -1 no point.
            box: (4,) as x0, y0, x1, y1.
            mask: logits (1, side / 4, side / 4) of an earlier prompt.
            multimask_output: three masks, of which `Masks.best` is one; False gives SAM's single mask.

        Raises:
            RuntimeError: there is no picture yet.
            ValueError: a prompt is not of this form, or lies outside of the picture.
        """
        if self.original is None:
            raise RuntimeError("Predictor: `set_image` comes before `predict`.")
        encoded = self.network.prompt_encoder(self._points(points, labels), self._box(box), self._mask(mask))
        logits, iou, _ = self.network.mask_decoder(
            self.embedding, self.image_pe, *encoded, multimask_output=multimask_output
        )
        full = full_size(logits, self.network.image_size, self.size, self.original)[0]
        return Masks((full > 0).cpu().numpy(), iou[0].cpu().numpy(), logits[0].cpu().numpy())

    def transformed(self, points: Tensor) -> Tensor:
        """Points (..., 2) of the picture in the frame."""
        assert self.original is not None
        (height, width), (orig_height, orig_width) = self.size, self.original
        factors = torch.tensor([width / orig_width, height / orig_height], dtype=torch.float64)
        return (points.double() * factors.to(points.device)).float()

    def _points(self, points: Any, labels: Any) -> tuple[Tensor, Tensor] | None:
        if points is None and labels is None:
            return None
        if points is None or labels is None:
            raise ValueError("points and labels come together: 1 for the object, 0 for what is beside it.")
        coords = _numbers(points, "points are (k, 2) as x, y")
        kinds = _numbers(labels, "labels of points are 1, 0 or -1")
        if coords.ndim != 2 or coords.shape[1] != 2 or kinds.shape != coords.shape[:1] or not len(coords):
            raise ValueError(
                f"points are (k, 2) with labels (k,), not {tuple(coords.shape)} with {tuple(kinds.shape)}."
            )
        wrong = [value for value in kinds.tolist() if value not in (-1, 0, 1)]
        if wrong:
            raise ValueError(f"labels of points are 1, 0 or -1, not {wrong[0]:g}.")
        self._inside(coords[kinds >= 0], "a point")
        return self.transformed(coords)[None].to(self.device), kinds[None].long().to(self.device)

    def _box(self, box: Any) -> Tensor | None:
        if box is None:
            return None
        corners = _numbers(box, "a box is x0, y0, x1, y1")
        if corners.shape != (4,):
            raise ValueError(f"a box is x0, y0, x1, y1, not {box}.")
        if corners[2] < corners[0] or corners[3] < corners[1]:
            raise ValueError(f"a box has x0 <= x1 and y0 <= y1, not {corners.tolist()}.")
        self._inside(corners.view(2, 2), "a corner of a box")
        return self.transformed(corners.view(2, 2)).view(1, 4).to(self.device)

    def _mask(self, mask: Any) -> Tensor | None:
        if mask is None:
            return None
        side = self.network.image_size // 4
        logits = torch.as_tensor(np.asarray(mask, np.float32))
        if logits.shape != (1, side, side):
            raise ValueError(f"a mask prompt is logits of (1, {side}, {side}), not {tuple(logits.shape)}.")
        return logits[None].to(self.device)

    def _inside(self, places: Tensor, what: str) -> None:
        assert self.original is not None
        height, width = self.original
        limits = torch.tensor([width, height])
        outside = (~places.isfinite() | (places < 0) | (places > limits)).any(dim=-1)
        if outside.any():
            x, y = places[outside][0].tolist()
            raise ValueError(
                f"{what} at ({x:g}, {y:g}) is outside of the picture of {width} x {height} pixels."
            )


def _numbers(values: Any, expected: str) -> Tensor:
    """Values as float64.

    Raises:
        ValueError: they are no numbers, or rows of different lengths.
    """
    try:
        return torch.as_tensor(np.asarray(values, np.float64))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{expected}, not {values}.") from error
