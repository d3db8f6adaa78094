"""Text that a distillation has written: samples to read, and a corpus for other models."""

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import printable
from callbacks.writers.base import PredictionWriter
from lightning_modules.dfkd_t3.networks import DistilledText


class GeneratedTextWriter(PredictionWriter):
    """Writes `generated.tsv` and `samples.txt` after `predict` of a `DataFreeDistillation`.

    `generated.tsv` has the columns `sentence`, `label`, `p_0` ... `p_{C-1}` in UTF-8, without quoting; tabs
    and newlines in a text become spaces. `GlueDataModule.generated` reads it to distil any other model, with
    a tokenizer of its own. Without this callback generated text stays in memory.

    Args:
        samples: texts of each class in `samples.txt`, those of which the teacher is surest; 0 writes none.
    """

    def __init__(self, samples: int = 10) -> None:
        super().__init__()
        if samples < 0:
            raise ValueError(f"GeneratedTextWriter: samples must not be negative, got {samples}.")
        self.samples = samples

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """`index`, `text` and `probabilities`; texts without a character are left out."""
        if not isinstance(module, DistilledText):
            raise MisconfigurationException(
                f"GeneratedTextWriter writes what a DataFreeDistillation predicts; "
                f"{type(module).__name__} is none."
            )
        columns = outputs["index"].tolist(), outputs["text"], outputs["probabilities"].tolist()
        for index, text, probabilities in zip(*columns, strict=True):
            sentence = " ".join(text.split())
            if sentence:
                yield {"index": index, "text": sentence, "probabilities": probabilities}

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Write both files."""
        path = run_directory(trainer) / "generated.tsv"
        surest: dict[int, list[tuple[float, str]]] = {}
        count = 0
        with (
            replaced_atomically(path) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="\n") as file,
        ):
            for row in rows:
                p = row["probabilities"]
                if not count:
                    file.write("\t".join(["sentence", "label", *(f"p_{i}" for i in range(len(p)))]) + "\n")
                label = max(range(len(p)), key=p.__getitem__)
                file.write("\t".join([row["text"], str(label), *(f"{value:.6f}" for value in p)]) + "\n")
                kept = surest.setdefault(label, [])
                if all(text != row["text"] for _, text in kept):
                    kept.append((p[label], row["text"]))
                    kept.sort(key=lambda pair: -pair[0])
                    del kept[self.samples :]
                count += 1
        announce(trainer, f"{count} generated texts written to {path}")
        if self.samples and count:
            self._write_samples(trainer, module, surest)

    def _write_samples(
        self, trainer: Trainer, module: Any, surest: dict[int, list[tuple[float, str]]]
    ) -> None:
        path, names = run_directory(trainer) / "samples.txt", module.label_names
        with replaced_atomically(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for label, texts in sorted(surest.items()):
                file.write(f"{names[label]}\n")
                file.writelines(f"  {p:.3f}  {printable(text)}\n" for p, text in texts)
        announce(trainer, f"samples to read are in {path}")
