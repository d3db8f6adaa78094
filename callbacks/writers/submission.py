"""Predictions on GLUE's test sets, as its site takes them."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.writers.base import PredictionWriter
from lightning_modules.parts.contracts import (
    HasClassNames,
    HasParts,
    HasSubmissions,
    datamodule_of,
    optional,
    require,
)


class SubmissionWriter(PredictionWriter):
    """Writes `SST-2.tsv`, `CoLA.tsv`, ... after `predict`: `index` and `prediction`, a row a test sentence.

    Predictions are the class's number, for the tasks of inference its name (`entailment`, ...), and for
    STS-B the score, limited to 0..5 with three digits. MNLI gives two files.
    """

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """`index` and `prediction`: a class, or a score."""
        if not isinstance(outputs, dict) or not {"probabilities", "score"} & outputs.keys():
            raise MisconfigurationException(
                "SubmissionWriter needs a predict_step that returns `probabilities` or `score`, as a "
                "TextClassifier's does."
            )
        scores = outputs.get("score")
        values = outputs["probabilities"].argmax(dim=-1) if scores is None else scores
        for index, value in zip(outputs["index"].tolist(), values.tolist(), strict=True):
            yield {"index": index, "prediction": value}

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Write one file for each part of the test set."""
        data = datamodule_of(trainer)
        submissions = require(data, HasSubmissions, "SubmissionWriter").submissions
        divided, named = require(data, HasParts, "SubmissionWriter"), optional(data, HasClassNames)
        files = list(submissions.values())
        if len(files) != len(divided.parts("predict")):
            raise MisconfigurationException(
                f"SubmissionWriter: {len(files)} files for other parts of the data."
            )
        names = list(named.class_names or ()) if named is not None else []
        words = "entailment" in names[:1]
        folder = run_directory(trainer)
        with ExitStack() as stack:
            streams = []
            for name in files:
                unfinished = stack.enter_context(replaced_atomically(folder / name))
                streams.append(stack.enter_context(unfinished.open("w", encoding="utf-8", newline="\n")))
            for stream in streams:
                stream.write("index\tprediction\n")
            for row in rows:
                value = row["prediction"]
                if isinstance(value, float):
                    text = f"{min(max(value, 0.0), 5.0):.3f}"
                else:
                    text = names[value] if words else str(value)
                streams[row["loader"]].write(f"{row['index']}\t{text}\n")
        announce(trainer, f"predictions for GLUE's site are in {', '.join(files)} of {folder}")
