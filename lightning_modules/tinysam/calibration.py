"""What a quantizer calibrates a segmenter with: pictures and prompts of every kind that evaluation has."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.parts.inference import OutputKind
from lightning_modules.tinysam.prompts import Prompts, decode_prompts

KINDS: Mapping[str, OutputKind] = {
    **dict.fromkeys(("point_masks", "click_masks", "box_masks"), "bernoulli"),
    **dict.fromkeys(("point_iou", "click_iou", "box_iou"), "probability"),
}
"""Of the outputs of the whole pass; logits of masks and predicted IoUs."""

POINTS, CLICKED, BOXES = 8, 4, 4
"""A picture's prompts of one positive point, of clicks, and of a box."""

CLICKS = (1, 0, 1)
"""Labels of the clicks of a prompt: on the mask, beside it, and on it."""

Prompted = tuple[Tensor, Tensor]
"""N prompts in pixels of the frame, and the picture (N,) of each."""


def calibration_points(batch: Mapping[str, Any], count: int = POINTS) -> Prompted:
    """Points drawn as those of training's first round: a mask, then a pixel of it, both uniform; the same for
    the same batch. A picture without masks is asked in uniform rectangles.

    Args:
        batch: of evaluation: `image`, `size`, `orig_size`, and `truth` where there are masks.
        count: of a picture.

    Returns:
        (N, 1, 2) as x, y in pixels of the frame, and the picture (N,) of each.
    """
    return _prompts(batch, count, lambda mask, generator: _pixel(mask, generator)[None])


def calibration_clicks(batch: Mapping[str, Any], count: int = CLICKED) -> Prompted:
    """Clicks (N, 3, 2) with the labels `CLICKS`, each on a uniform pixel; arguments as of
    `calibration_points`.
    """

    def clicks(mask: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([_pixel(mask if label else ~mask, generator) for label in CLICKS])

    return _prompts(batch, count, clicks)


def calibration_boxes(batch: Mapping[str, Any], count: int = BOXES) -> Prompted:
    """Boxes of masks, (N, 4) as x1, y1, x2, y2; arguments as of `calibration_points`."""

    def corners(mask: Tensor, generator: torch.Generator) -> Tensor:
        pixels = mask.nonzero().float()
        return torch.stack([pixels.amin(0) - 0.5, pixels.amax(0) + 0.5])

    boxes, owner = _prompts(batch, count, corners)
    return boxes.flatten(1), owner


def _prompts(
    batch: Mapping[str, Any], count: int, draw: Callable[[Tensor, torch.Generator], Tensor]
) -> Prompted:
    """What `draw` gives of masks that are drawn uniformly: rows and columns (k, 2) of a mask become x, y in
    the frame, (N, k, 2). Of a picture without masks, `draw` sees uniform rectangles.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for masks, scale in _pictures(batch, count, generator):
        chosen = torch.randint(len(masks), (count,), generator=generator).tolist()
        pixels = torch.stack([draw(masks[number], generator) for number in chosen])
        prompts.append(((pixels + 0.5) * scale - 0.5).flip(-1))
    return torch.cat(prompts), torch.arange(len(prompts)).repeat_interleave(count)


def _pictures(
    batch: Mapping[str, Any], count: int, generator: torch.Generator
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Of each picture, masks that are not empty, bool (height, width), and its scale in the frame, (2,)."""
    size, original = (batch[name].float().cpu() for name in ("size", "orig_size"))
    for place, (ours, theirs) in enumerate(zip(size, original, strict=True)):
        truth = batch["truth"][place] if "truth" in batch else ()
        masks = [mask for mask in (torch.as_tensor(mask).cpu().bool() for mask in truth) if mask.any()]
        yield masks or [_rectangle(theirs, generator) for _ in range(count)], ours / theirs


def _rectangle(size: Tensor, generator: torch.Generator) -> Tensor:
    """Bool (height, width), true between two uniform pixels."""
    height, width = size.int().tolist()
    ends = (torch.rand(2, 2, generator=generator) * size).long()
    (top, left), (bottom, right) = ends.amin(0).tolist(), ends.amax(0).tolist()
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def _pixel(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Row and column of a pixel of a mask; of any pixel where it has none."""
    pixels = mask.nonzero() if mask.any() else torch.ones_like(mask).nonzero()
    return pixels[torch.randint(len(pixels), (), generator=generator)].float()


class CalibrationPass:
    """Of `TinySAMModule`: the encoder and the decoder in one pass, where a report or an export sees the first
    alone.
    """

    network: Any

    def calibration_pass(
        self, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Callable[..., dict[str, Tensor]]]:
        """`image`, `size`, and the prompts of each kind with their `owner`; and `decoded`.

        All kinds that evaluation prompts with: a label or a corner that calibration never saw would leave the
        ranges of what it did see.
        """
        inputs = {"image": batch["image"], "size": batch["size"]}
        kinds = {"point": calibration_points, "click": calibration_clicks, "box": calibration_boxes}
        for name, draw in kinds.items():
            prompts, owner = draw(batch)
            inputs[name], inputs[f"{name}_owner"] = (x.to(batch["image"].device) for x in (prompts, owner))
        return inputs, self.decoded

    def decoded(
        self,
        image: Tensor,
        size: Tensor,
        point: Tensor,
        point_owner: Tensor,
        click: Tensor,
        click_owner: Tensor,
        box: Tensor,
        box_owner: Tensor,
    ) -> dict[str, Tensor]:
        """Of each kind of prompts `masks` (N, 3, 4h, 4w) as logits and `iou` (N, 3), named as in `KINDS`."""
        embedding: Tensor = self(image, size)  # type: ignore[operator]
        labels = torch.tensor(CLICKS, device=click.device).expand(len(click), -1)
        encode = self.network.prompt_encoder
        encoded = {
            "click": (click_owner, encode((click, labels), None, None)),
            "box": (box_owner, encode(None, box, None)),
        }
        prompts = Prompts(point, point.new_zeros(len(point), 4), torch.zeros_like(point_owner).bool())
        answers = decode_prompts(self.network, embedding, point_owner, prompts)
        outputs = {"point_masks": answers["masks"], "point_iou": answers["iou"]}
        for name, (owner, (sparse, dense)) in encoded.items():
            masks, iou, _ = self.network.mask_decoder(embedding[owner], encode.get_dense_pe(), sparse, dense)
            outputs |= {f"{name}_masks": masks, f"{name}_iou": iou}
        return outputs
