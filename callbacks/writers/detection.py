"""Detections as files: COCO's results format for programs, pictures with boxes for people."""

import colorsys
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import printable, readable
from callbacks.writers.base import PredictionWriter
from callbacks.writers.drawing import open_picture, shortened
from lightning_modules.parts.contracts import (
    HasCategoryIds,
    HasClassNames,
    HasNumClasses,
    HasPredictedEntries,
    datamodule_of,
    optional,
)

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

NEEDED = ("scores", "labels", "boxes", "image_id", "index", "path")


class DetectionWriter(PredictionWriter):
    """Writes `detections.json` and the folder `detections/` with drawn pictures after `predict`.

    The JSON is a list in COCO's results format, as `pycocotools` and COCO's server read it: `image_id`,
    `category_id`, `bbox` (x, y, width, height in pixels) and `score`, by image and falling score, and beside
    the ids what they stand for, `file_name` and `category_name`. Ids are those of the annotation file that is
    predicted on, by the data module's `category_ids` and `predicted_entry` where it has them; else the
    labels themselves. A class without an id there is left out, and counted. Pictures are drawn by the rank
    that made the prediction, while it goes on.

    Args:
        min_score: detections below it are left out of the JSON; COCO's evaluation wants all, so 0.
        draw_score: detections below it are not drawn.
        max_pictures: most pictures to draw, the first ones; null draws all, 0 none.
        max_side: longest side of a drawn picture, pixels; larger ones are scaled down. Null keeps their size.
    """

    def __init__(
        self,
        min_score: float = 0.0,
        draw_score: float = 0.4,
        max_pictures: int | None = None,
        max_side: int | None = 1600,
    ) -> None:
        super().__init__()
        for option, value in (("min_score", min_score), ("draw_score", draw_score)):
            if not 0 <= value <= 1:
                raise ValueError(f"DetectionWriter: {option} is between 0 and 1, not {value}.")
        if max_pictures is not None and max_pictures < 0:
            raise ValueError(f"DetectionWriter: max_pictures is at least 0, or null, not {max_pictures}.")
        self.min_score = min_score
        self.draw_score = draw_score
        self.max_pictures = max_pictures
        self.max_side = max_side
        self._names: Sequence[str] = ()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty, without the pictures of an earlier run, and fetch the class names."""
        if trainer.is_global_zero:
            shutil.rmtree(pictures(trainer), ignore_errors=True)
        super().on_predict_start(trainer, pl_module)
        model, data = optional(pl_module, HasNumClasses), optional(datamodule_of(trainer), HasClassNames)
        count = (0 if model is None else model.num_classes) or 0
        known = (() if data is None else data.class_names) or ()
        # a data set may use fewer labels than the model has
        self._names = [*known, *(f"class {label}" for label in range(len(known), count))]
        if self.max_pictures != 0:
            pictures(trainer).mkdir(parents=True, exist_ok=True)

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """`index`, and `detections` as rows of x, y, width, height, score and label.

        Raises:
            MisconfigurationException: `predict_step` returned no detections.
        """
        if not isinstance(outputs, Mapping) or not set(NEEDED) <= outputs.keys():
            raise MisconfigurationException(
                f"DetectionWriter needs a predict_step that returns {', '.join(NEEDED)}, as "
                f"DecoDetector's does; "
                f"{type(module).__name__} returned {type(outputs).__name__}."
            )
        columns = [outputs[name].tolist() for name in ("index", "image_id", "scores", "labels", "boxes")]
        for index, image_id, scores, labels, boxes, path in zip(*columns, outputs["path"], strict=True):
            found = [
                [x1, y1, x2 - x1, y2 - y1, score, label]
                for score, label, (x1, y1, x2, y2) in zip(scores, labels, boxes, strict=True)
            ]
            shown = [row for row in found if row[4] >= self.draw_score]
            if self.max_pictures is None or index < self.max_pictures:
                self._draw(trainer, Path(path), index, shown)
            else:
                shown = []
            kept = [row for row in found if row[4] >= self.min_score]
            known = {"image_id": image_id, "file_name": Path(path).name}
            yield {"index": index, **known, "detections": kept, "drawn": len(shown)}

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """The JSON, one detection a line."""
        data = datamodule_of(trainer)
        numbered, named = optional(data, HasCategoryIds), optional(data, HasPredictedEntries)
        ids = numbered.category_ids if numbered is not None else ()
        path = run_directory(trainer) / "detections.json"
        images = count = nameless = drawn = 0
        with replaced_atomically(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            file.write("[")
            for row in rows:
                images += 1
                drawn += bool(row["drawn"])
                known = row if named is None else named.predicted_entry(row["index"])
                for *bbox, score, label in row["detections"]:
                    category = ids[label] if label < len(ids) else label
                    if category == -1:
                        nameless += 1
                        continue
                    result = {
                        "image_id": known["image_id"],
                        "file_name": readable(known["file_name"]),
                        "category_id": category,
                        "category_name": readable(self._name(label)),
                        "bbox": bbox,
                        "score": score,
                    }
                    file.write(f"{',' if count else ''}\n{json.dumps(result)}")
                    count += 1
            file.write("\n]\n")
        lost = f" ({nameless} of labels without a category there are left out)" if nameless else ""
        announce(trainer, f"{count} detections in {images} images written to {path}{lost}")
        if self.max_pictures != 0:
            shown = images if self.max_pictures is None else min(images, self.max_pictures)
            boxes = f"{drawn} of {shown} have a box of score {self.draw_score:g} or more (draw_score)"
            announce(trainer, f"pictures drawn in {pictures(trainer)}: {boxes}")

    def _draw(self, trainer: Trainer, source: Path, index: int, found: list[list[float]]) -> None:
        picture = open_picture(trainer, source, index)
        drawn = draw_detections(picture, found, self._names, self.max_side)
        stem = os.fsdecode(os.fsencode(source.stem)[:200])  # a name has room for 255 bytes
        drawn.save(pictures(trainer) / f"{index:06d}_{stem}.jpg", quality=90)

    def _name(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else f"class {label}"


def pictures(trainer: Trainer) -> Path:
    """Where the drawn pictures are."""
    return run_directory(trainer) / "detections"


def draw_detections(
    picture: "Image.Image",
    detections: Sequence[Sequence[float]],
    names: Sequence[str],
    max_side: int | None = None,
) -> "Image.Image":
    """A copy of `picture` with a frame and a name around each detection.

    Args:
        picture: RGB.
        detections: rows of x, y, width, height in pixels of `picture`, score and label; the best are drawn
            last, on top.
        names: of the labels.
        max_side: scale the picture down to it first, if it is larger.
    """
    from PIL import ImageDraw, ImageFont

    scale = 1.0 if max_side is None else min(1.0, max_side / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    drawn = picture.resize(size) if size != picture.size else picture.copy()
    unit = max(1, round(max(size) / 400))  # thickness that is seen on small and on large pictures
    font = ImageFont.load_default(size=10 + 3 * unit)
    draw = ImageDraw.Draw(drawn)
    for x, y, width, height, score, label in sorted(detections, key=lambda row: row[4]):
        corners = [side * scale for side in (x, y, x + max(width, 0), y + max(height, 0))]
        name = names[int(label)] if int(label) < len(names) else f"class {int(label)}"
        frame = [min(max(side, 0), limit - 1) for side, limit in zip(corners, size * 2, strict=True)]
        draw.rectangle(frame, outline=colour_of(int(label)), width=unit)
        _tag(draw, frame, f"{printable(name)} {100 * score:.0f}%", colour_of(int(label)), font, size)
    return drawn


def _tag(
    draw: "ImageDraw.ImageDraw",
    frame: Sequence[float],
    text: str,
    colour: str,
    font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
    size: tuple[int, int],
) -> None:
    """The text on a coloured ground above the frame, or inside where there is no room above."""
    text = shortened(text, font, size[0] - 4)
    left, _, right, bottom = font.getbbox(text)
    width, height = right - left + 4, bottom + 2
    x = max(0.0, min(frame[0], size[0] - width))
    y = frame[1] - height if frame[1] >= height else frame[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2, y), text, fill="black", font=font)


def colour_of(label: int) -> str:
    """A light colour for each label, neighbours far apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.55, 1.0)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
