"""Masks as files: COCO's run lengths for programs, overlays and cut-outs for people."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import readable
from callbacks.writers.base import PredictionWriter
from callbacks.writers.detection import colour_of
from callbacks.writers.drawing import open_picture

if TYPE_CHECKING:
    from PIL import Image

NEEDED = ("index", "path", "records")


class MaskWriter(PredictionWriter):
    """Writes `masks.json` and the folder `masks/` with overlays, and cut-outs on request, after `predict`.

    The JSON is a list, one mask a line, by image: `image_id` (the position of the picture), `file_name`,
    `segmentation` in COCO's compressed run lengths, `bbox` (x, y, width, height), `area`, `score` (the
    predicted IoU) and what else the record says, such as the prompt. Pictures are drawn by the rank that
    made the prediction, while it goes on. (pycocotools 2.0.11 takes the area of a result that has a `bbox`
    from it: remove `bbox` from the file before measuring AP by size with it.)

    Args:
        min_score: masks of a lower predicted IoU are left out.
        max_pictures: most pictures to draw, the first ones; null draws all, 0 none.
        cut_outs: write each mask's part of its picture too, as a PNG with transparency.
    """

    def __init__(
        self, min_score: float = 0.0, max_pictures: int | None = None, cut_outs: bool = False
    ) -> None:
        super().__init__()
        if max_pictures is not None and max_pictures < 0:
            raise ValueError(f"MaskWriter: max_pictures is at least 0, or null, not {max_pictures}.")
        self.min_score, self.max_pictures, self.cut_outs = min_score, max_pictures, cut_outs

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty, without the pictures of an earlier run."""
        if trainer.is_global_zero:
            shutil.rmtree(_pictures(trainer), ignore_errors=True)
        super().on_predict_start(trainer, pl_module)
        _pictures(trainer).mkdir(parents=True, exist_ok=True)

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """`index`, `file_name` and `masks`, the records of one picture.

        Raises:
            MisconfigurationException: `predict_step` returned no masks.
        """
        if not isinstance(outputs, Mapping) or not set(NEEDED) <= outputs.keys():
            raise MisconfigurationException(
                f"MaskWriter needs a predict_step that returns {', '.join(NEEDED)}, as TinySAMModule's does; "
                f"{type(module).__name__} returned {type(outputs).__name__}."
            )
        indices = [int(index) for index in outputs["index"]]
        for index, path, records in zip(indices, outputs["path"], outputs["records"], strict=True):
            kept = [record for record in records if record["predicted_iou"] >= self.min_score]
            if self.max_pictures is None or index < self.max_pictures:
                self._draw(trainer, Path(path), index, kept)
            yield {"index": index, "file_name": Path(path).name, "masks": kept}

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """The JSON, one mask a line."""
        path = run_directory(trainer) / "masks.json"
        images = count = 0
        with replaced_atomically(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            file.write("[")
            for row in rows:
                images += 1
                known = {"image_id": row["index"], "file_name": readable(row["file_name"])}
                for record in row["masks"]:
                    result = {**known, **record, "score": record["predicted_iou"]}
                    file.write(f"{',' if count else ''}\n{json.dumps(result)}")
                    count += 1
            file.write("\n]\n")
        announce(
            trainer, f"{count} masks in {images} images written to {path}, drawn in {_pictures(trainer)}"
        )

    def _draw(self, trainer: Trainer, source: Path, index: int, records: list[dict[str, Any]]) -> None:
        from PIL import Image
        from pycocotools import mask as coco_mask

        picture = open_picture(trainer, source, index)
        masks = [coco_mask.decode(record["segmentation"]).astype(bool) for record in records]
        stem = f"{index:06d}_{os.fsdecode(os.fsencode(source.stem)[:200])}"  # a name has room for 255 bytes
        drawn = picture.convert("RGBA")
        layer = overlay_of(masks, (picture.height, picture.width))
        Image.alpha_composite(drawn, layer).convert("RGB").save(_pictures(trainer) / f"{stem}.png")
        if self.cut_outs:
            for number, mask in enumerate(masks):
                if mask.any():
                    cut = cut_out(np.asarray(picture), mask)
                    cut.save(_pictures(trainer) / f"{stem}_{number:03d}.png")


def _pictures(trainer: Trainer) -> Path:
    return run_directory(trainer) / "masks"


def overlay_of(masks: Sequence[NDArray[np.bool_]], size: tuple[int, ...] | None = None) -> "Image.Image":
    """Masks in colours on a transparent ground (RGBA), small ones on top.

    Args:
        masks: bool (height, width) each.
        size: height and width; needed where there is no mask.
    """
    from PIL import Image, ImageColor

    height, width = masks[0].shape if size is None else size[:2]
    layer = np.zeros((height, width, 4), np.uint8)
    for number in sorted(range(len(masks)), key=lambda row: -int(masks[row].sum())):
        layer[masks[number]] = (*ImageColor.getrgb(colour_of(number + 3))[:3], 140)
    return Image.fromarray(layer)


def cut_out(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> "Image.Image":
    """The masked part of a picture, cropped to its box and transparent around it; one pixel of an empty mask.

    Args:
        image: uint8 RGB (height, width, 3).
        mask: bool (height, width).
    """
    from PIL import Image

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Image.new("RGBA", (1, 1))
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    alpha = np.where(mask[part], 255, 0).astype(np.uint8)[..., None]
    return Image.fromarray(np.concatenate([image[part], alpha], axis=-1))
