"""Predictions as files: streamed by every rank, merged in order by rank 0."""

import contextlib
import csv
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import cells, printable
from callbacks.writers.base import PredictionWriter
from callbacks.writers.drawing import INK, WRONG, contact_sheet, fit_into, to_pil
from lightning_modules.parts.contracts import HasClassNames, datamodule_of, optional

if TYPE_CHECKING:
    from PIL import Image


class ClassificationWriter(PredictionWriter):
    """Writes `predictions.csv` and a picture of some images, `contact_sheet.png`, after `predict`.

    Columns: `index`, `path`, `label`, `label_name` (empty where unknown), then `class_1`, `name_1`,
    `probability_1` for the most probable class, and so on down to `top_k`. On the sheet a prediction that
    disagrees with a known label is red and names the label.

    The images of the sheet are spread evenly over the data, which are often in the order of their classes.
    Class names come from the data module's `class_names`, else from the module's, else they are like
    `class_12`.

    Args:
        top_k: classes an image; at most as many as there are.
        sheet_images: images on the contact sheet; 0 makes none.
        sheet_columns: images in a row of it; None makes the sheet about four by three.
    """

    def __init__(self, top_k: int = 5, sheet_images: int = 24, sheet_columns: int | None = None) -> None:
        super().__init__()
        if top_k < 1 or sheet_images < 0:
            raise ValueError(
                "ClassificationWriter: top_k must be at least 1 and sheet_images at least 0, not "
                f"{top_k} and {sheet_images}."
            )
        self.top_k = top_k
        self.sheet_images = sheet_images
        self.sheet_columns = sheet_columns
        self._kept = 0
        self._chosen: frozenset[int] = frozenset()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty."""
        super().on_predict_start(trainer, pl_module)
        self._kept = 0
        length = _predicted(trainer) or self.sheet_images
        self._chosen = _spread(length, min(self.sheet_images, length))

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """`index`, `path`, `label`, `classes` and `probabilities` (the `top_k`), `thumbnail` for those
        of the sheet.

        Raises:
            MisconfigurationException: `predict_step` returned no `probabilities` and `index`.
        """
        if not isinstance(outputs, dict) or not {"probabilities", "index"} <= outputs.keys():
            raise MisconfigurationException(
                "ClassificationWriter needs a predict_step that returns a dictionary with `index` (batch,) "
                f"and `probabilities` (batch, classes); {type(module).__name__} returned "
                f"{_described(outputs)}."
            )
        probabilities = outputs["probabilities"].float()  # (batch, classes)
        values, classes = probabilities.topk(min(self.top_k, probabilities.shape[1]))  # (batch, top_k)
        known = {**(batch if isinstance(batch, dict) else {}), **outputs}
        count = len(probabilities)
        columns = zip(
            outputs["index"].tolist(),
            known.get("path") or [None] * count,
            _labels(known.get("label"), count),
            classes.tolist(),
            values.tolist(),
            strict=True,
        )
        total = probabilities.shape[1]
        for place, (index, path, label, top, probability) in enumerate(columns):
            row = {"index": index, "path": None if path is None else str(path), "label": label}
            thumbnail = self._thumbnail(trainer, known.get("image"), place) if index in self._chosen else None
            yield {**row, "classes": top, "probabilities": probability, "of": total, "thumbnail": thumbnail}

    def _thumbnail(self, trainer: Trainer, images: Any, place: int) -> str | None:
        """Save a small picture of one of the images beside its shard; the name of the file."""
        if not isinstance(images, Tensor):
            return None
        name = f"rank{trainer.global_rank:05d}-{self._kept}.png"
        picture = to_pil(images[place])
        if max(picture.size) > 320:
            picture = fit_into(picture, 320)
        picture.save(self.shards(trainer) / name)
        self._kept += 1
        return name

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Write the table, and draw the images that have a thumbnail."""
        path = run_directory(trainer) / "predictions.csv"
        shown: list[dict[str, Any]] = []
        names: Sequence[str] = ()
        count = 0
        with (
            replaced_atomically(path) as unfinished,
            unfinished.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file)
            for count, row in enumerate(rows, start=1):
                if count == 1:
                    names = class_names(trainer, module, row["of"])
                    table.writerow(_header(len(row["classes"])))
                table.writerow(cells(_cells(row, names)))
                if row["thumbnail"] is not None and len(shown) < self.sheet_images:
                    shown.append(row)
            if count == 0:
                table.writerow(_header(self.top_k))
        announce(trainer, f"{count} predictions written to {path}")
        if shown:
            picture = self._draw(shown, names, self.shards(trainer))
            path = run_directory(trainer) / "contact_sheet.png"
            with replaced_atomically(path) as unfinished:
                picture.save(unfinished)
            announce(trainer, f"{len(shown)} of {count} images drawn in {path}")

    def _draw(self, shown: Sequence[dict[str, Any]], names: Sequence[str], shards: Path) -> "Image.Image":
        from PIL import Image

        pictures, captions, colours = [], [], []
        for row in shown:
            with Image.open(shards / row["thumbnail"]) as picture:
                pictures.append(picture.convert("RGB"))
            top, label = row["classes"][0], row["label"]
            wrong = label is not None and label != top
            caption = f"{100 * row['probabilities'][0]:.0f}% {printable(names[top])}"
            captions.append(f"{caption}\nlabel: {printable(_name(names, label))}" if wrong else caption)
            colours.append(WRONG if wrong else INK)
        return contact_sheet(pictures, captions, colours, self.sheet_columns)


def _predicted(trainer: Trainer) -> int:
    """How many samples are predicted on, by the longest of the loaders; 0 where they do not say."""
    loaders = trainer.predict_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    counts = [0]
    for loader, batches in zip(loaders, trainer.num_predict_batches, strict=False):
        with contextlib.suppress(TypeError, AttributeError):  # a stream has no length
            counts.append(round(len(loader.dataset) * batches / len(loader)))
    return max(counts)


def _spread(length: int, count: int) -> frozenset[int]:
    """`count` of `length` places, one at random in each of equal stretches, as data may be sorted."""
    generator = random.Random(0)
    ends = [number * length // count for number in range(count + 1)] if count else []
    return frozenset(generator.randrange(start, end) for start, end in itertools.pairwise(ends))


def _described(outputs: Any) -> str:
    return f"a dictionary of {sorted(outputs)}" if isinstance(outputs, dict) else type(outputs).__name__


def _labels(labels: Any, count: int) -> list[int | None]:
    """Class numbers of a batch; None where there is none, or a negative one, which stands for unknown."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return [None] * count
    return [label if label >= 0 else None for label in labels.tolist()]


def _header(top_k: int) -> list[str]:
    ranks = range(1, top_k + 1)
    columns = [f"{column}_{rank}" for rank in ranks for column in ("class", "name", "probability")]
    return ["index", "path", "label", "label_name", *columns]


def _cells(row: dict[str, Any], names: Sequence[str]) -> list[Any]:
    label = row["label"]
    cells = [row["index"], row["path"], label, None if label is None else _name(names, label)]
    for number, probability in zip(row["classes"], row["probabilities"], strict=True):
        cells += [number, names[number], f"{probability:.6f}"]
    return cells


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else f"class_{number}"


def class_names(trainer: Trainer, module: LightningModule, count: int) -> Sequence[str]:
    """Names of `count` classes: the data module's, else the module's, else numbers.

    Raises:
        MisconfigurationException: the names are of another number of classes.
    """
    for owner in (datamodule_of(trainer), module):
        names, named = None, optional(owner, HasClassNames)
        with contextlib.suppress(MisconfigurationException):  # how a data module says that it has none
            names = None if named is None else named.class_names
        if names:
            if len(names) != count:
                raise MisconfigurationException(
                    f"{type(owner).__name__}.class_names has {len(names)} names, but the predictions are "
                    f"over {count} classes."
                )
            return [str(name) for name in names]
    return [f"class_{number}" for number in range(count)]
