"""What a quantizer calibrates a segmenter with: pictures and points on them, masks and predicted IoUs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.parts.inference import OutputKind
from lightning_modules.tinysam.prompts import Prompts, decode_prompts

KINDS: Mapping[str, OutputKind] = {"masks": "bernoulli", "iou": "probability"}
"""Of the outputs of the whole pass; logits of masks and predicted IoUs."""

POINTS = 16
"""A picture's prompts, each one positive point."""


def calibration_points(batch: Mapping[str, Any], count: int = POINTS) -> tuple[Tensor, Tensor]:
    """Points drawn as those of training's first round: a mask, then a pixel of it, both uniform; the same for
    the same batch. A picture without masks is asked at uniform places.

    Args:
        batch: of evaluation: `image`, `size`, `orig_size`, and `truth` where there are masks.
        count: of a picture.

    Returns:
        (N, 1, 2) as x, y in pixels of the frame, and the picture (N,) of each.
    """
    generator = torch.Generator().manual_seed(0)
    size, original = (batch[name].float().cpu() for name in ("size", "orig_size"))
    points = []
    for place, (ours, theirs) in enumerate(zip(size, original, strict=True)):
        truth = batch["truth"][place] if "truth" in batch else ()
        masks = [torch.as_tensor(mask).cpu() for mask in truth]
        if masks:
            chosen = torch.randint(len(masks), (count,), generator=generator).tolist()
            pixels = torch.stack([_pixel(masks[number], generator) for number in chosen])
        else:
            pixels = (torch.rand(count, 2, generator=generator) * theirs).floor()
        points.append(((pixels + 0.5) * (ours / theirs) - 0.5).flip(-1))
    owner = torch.arange(len(size)).repeat_interleave(count)
    return torch.cat(points)[:, None], owner


def _pixel(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Row and column of a pixel of a mask."""
    pixels = mask.nonzero()
    return pixels[torch.randint(len(pixels), (), generator=generator)].float()


class CalibrationPass:
    """Of `TinySAMModule`: the encoder and the decoder in one pass, where a report or an export sees the first
    alone.
    """

    network: Any

    def calibration_pass(
        self, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Callable[..., dict[str, Tensor]]]:
        """`image`, `size`, and `points` with their `owner`, see `calibration_points`; and `decoded`."""
        points, owner = calibration_points(batch)
        device = batch["image"].device
        rest = {"points": points.to(device), "owner": owner.to(device)}
        return {"image": batch["image"], "size": batch["size"], **rest}, self.decoded

    def decoded(self, image: Tensor, size: Tensor, points: Tensor, owner: Tensor) -> dict[str, Tensor]:
        """`masks` (N, 3, 4h, 4w) as logits and `iou` (N, 3)."""
        prompts = Prompts(points, points.new_zeros(len(points), 4), torch.zeros_like(owner, dtype=torch.bool))
        embedding: Tensor = self(image, size)  # type: ignore[operator]
        decoded = decode_prompts(self.network, embedding, owner, prompts)
        return {name: decoded[name] for name in KINDS}
