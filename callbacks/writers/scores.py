"""A detector's predictions: a score an image, and what the threshold makes of it."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.writers.base import PredictionWriter
from callbacks.writers.drawing import WRONG, contact_sheet, fit_into, open_picture
from lightning_modules.gendet.detector import FakeDetector

GENERATED, PHOTOGRAPH = "#b26a00", "#2e7d32"


class ScoreWriter(PredictionWriter):
    """Writes `scores.csv` and a picture of some images, `scores.png`, after `predict` of a `FakeDetector`.

    Columns: `index`, `path`, `score` (0 real to 1 generated), `threshold`, `verdict` (`real` or `fake`),
    `label` where it is known, and `discrepancy` where the detector has one. On the picture verdicts are
    orange for fake and green for real, and red where a known label says otherwise.

    Args:
        threshold: `calibrated`, chosen on validation data in `fit` and kept in the checkpoint (fake at or
            above it), or `half` (fake above 0.5).
        sheet_images: images on the picture, spread evenly over the scores from low to high; 0 makes none.
    """

    def __init__(
        self, threshold: Literal["calibrated", "half"] = "calibrated", sheet_images: int = 24
    ) -> None:
        super().__init__()
        if sheet_images < 0:
            raise ValueError(f"ScoreWriter: sheet_images must not be negative, got {sheet_images}.")
        self.threshold = threshold
        self.sheet_images = sheet_images

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """`index`, `path`, `label`, `score`, `discrepancy`."""
        if not isinstance(outputs, dict) or not {"score", "index"} <= outputs.keys():
            raise MisconfigurationException(
                "ScoreWriter needs a predict_step that returns `index` and `score`, as a FakeDetector's does."
            )
        count = len(outputs["score"])
        columns = {
            name: outputs[name].tolist() if name in outputs else [None] * count
            for name in ("index", "score", "label", "discrepancy")
        }
        paths = outputs.get("path") or [None] * count
        for place in range(count):
            row = {name: values[place] for name, values in columns.items()}
            yield {**row, "path": None if paths[place] is None else str(paths[place])}

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Write the table and the picture.

        Raises:
            MisconfigurationException: the module has no threshold.
        """
        if not isinstance(module, FakeDetector):
            raise MisconfigurationException(
                f"ScoreWriter writes what a FakeDetector predicts; {type(module).__name__} is none."
            )
        calibrated = self.threshold == "calibrated"
        threshold = module.threshold.item() if calibrated else 0.5
        path = run_directory(trainer) / "scores.csv"
        fakes, kept = 0, []
        with (
            replaced_atomically(path) as unfinished,
            unfinished.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file)
            table.writerow(["index", "path", "score", "threshold", "verdict", "label", "discrepancy"])
            for row in rows:
                fake = row["score"] >= threshold if calibrated else row["score"] > threshold
                fakes += fake
                label = "" if row["label"] is None else ("real", "fake")[row["label"]]
                verdict = "fake" if fake else "real"
                drawn = "" if row["discrepancy"] is None else f"{row['discrepancy']:.6g}"
                score = f"{row['score']:.6f}"
                table.writerow([row["index"], row["path"], score, f"{threshold:.6f}", verdict, label, drawn])
                kept.append((row["score"], row["path"], verdict, label))
        announce(trainer, f"{len(kept)} scores written to {path}: {fakes} fake at {threshold:.3f}")
        if self.sheet_images and kept and kept[0][1] is not None:
            self._draw(trainer, kept)

    def _draw(self, trainer: Trainer, kept: list[tuple[float, str, str, str]]) -> None:
        ordered = sorted(kept)
        count = min(self.sheet_images, len(ordered))
        step = (len(ordered) - 1) / max(1, count - 1)
        chosen = [ordered[round(place * step)] for place in range(count)]
        pictures, captions, colours = [], [], []
        for score, path, verdict, label in chosen:
            pictures.append(fit_into(open_picture(trainer, path), 160))
            wrong = bool(label) and label != verdict
            captions.append(f"{score:.3f} {verdict}\n{'label: ' + label if wrong else Path(path).name}")
            colours.append(WRONG if wrong else {"fake": GENERATED, "real": PHOTOGRAPH}[verdict])
        target = run_directory(trainer) / "scores.png"
        with replaced_atomically(target) as unfinished:
            contact_sheet(pictures, captions, colours).save(unfinished)
        announce(trainer, f"{count} images from the lowest to the highest score drawn in {target}")
