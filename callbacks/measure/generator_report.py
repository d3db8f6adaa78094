"""What a test found, generator by generator: the papers' table and the histograms of the discrepancy."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.run import escaping
from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import cells, plotted
from lightning_modules.gendet.detector import FakeDetector
from lightning_modules.gendet.evaluation import GeneratorScore, unweighted_mean
from lightning_modules.parts.contracts import HasPrintedNames, datamodule_of, optional

COLUMNS = (
    "generator",
    "seen",
    "real",
    "fake",
    "accuracy",
    "ap",
    "real_accuracy",
    "fake_accuracy",
    "calibrated_accuracy",
    "oracle_accuracy",
    "discrepancy_auc",
    "teacher_ap",
)
SHARES = COLUMNS[4:]


class GeneratorReport(Callback):
    """Writes `generators.csv`, `generators.md` and `discrepancy.png` after `test` of a `FakeDetector`.

    The CSV has a row a test set: images, accuracy at 0.5, AP, accuracy on reals and on fakes, accuracy at the
    threshold chosen on validation data, at the threshold that is best on the set itself (which knows the
    answers), AUC of the mean discrepancy and AP of the teacher's logit; then the unweighted means, over all
    sets, the seen and the unseen ones. Shares are in percent.

    The Markdown table is the papers': a column a test set in the published order, and their mean; rows of
    AP and accuracy at 0.5. A star marks the generators that were trained on.

    The picture has a histogram a test set, of real and generated images: of the mean discrepancy, or of the
    score where the detector has no student.

    Args:
        digits: after the decimal point of a percentage: UniversalFakeDetect prints 2, GenImage 1.
        rows: of the Markdown table; GenImage prints only the accuracy.
        histogram: what is drawn.
        bins: of a histogram; the last one also has what lies above the 99.5th percentile.
    """

    name = "generators"

    def __init__(
        self,
        digits: int = 2,
        rows: list[Literal["ap", "accuracy"]] | None = None,
        histogram: Literal["discrepancy", "score", "none"] = "discrepancy",
        bins: int = 40,
    ) -> None:
        if bins < 2 or digits < 0:
            raise ValueError(
                f"GeneratorReport: bins must be at least 2 and digits 0, got {bins} and {digits}."
            )
        self.digits = digits
        self.rows: Sequence[str] = rows or ["ap", "accuracy"]
        self.histogram = histogram
        self.bins = bins

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files on rank 0."""
        if not isinstance(pl_module, FakeDetector):
            raise MisconfigurationException(
                f"GeneratorReport reports on a FakeDetector; {type(pl_module).__name__} is none."
            )
        if not trainer.is_global_zero:
            return
        folder, scores = run_directory(trainer), pl_module.generator_scores
        names = self._printed(trainer)
        with replaced_atomically(folder / "generators.csv") as unfinished:
            write_table(unfinished, scores, self.digits)
        with replaced_atomically(folder / "generators.md") as unfinished:
            unfinished.write_text(markdown(scores, names, self.rows, self.digits), encoding="utf-8")
        announce(trainer, f"the table by generator is in {folder / 'generators.md'} and generators.csv")
        if self.histogram != "none":
            values = pl_module.rows.get(self.histogram, pl_module.rows["score"])
            with replaced_atomically(folder / "discrepancy.png") as unfinished:
                draw_histograms(unfinished, pl_module.rows, values, scores, names, self.bins)
            announce(trainer, f"histograms of real and fake in {folder / 'discrepancy.png'}")

    def _printed(self, trainer: Trainer) -> Mapping[str, str]:
        data = optional(datamodule_of(trainer), HasPrintedNames)
        return {} if data is None else data.printed_names

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Every test set's numbers, shares in 0..1."""
        if not isinstance(module, FakeDetector):
            return {}
        report = {row.generator: {**row.as_dict()} for row in module.generator_scores}
        for row in report.values():
            del row["generator"]
        return {**report, "threshold": module.threshold.item()}


def write_table(path: Path, scores: Sequence[GeneratorScore], digits: int) -> None:
    """A CSV row a test set, then the unweighted means; shares in percent."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in scores:
            shares = [_percent(getattr(row, name), digits) for name in SHARES]
            table.writerow(cells([row.generator, "yes" if row.seen else "no", row.real, row.fake, *shares]))
        groups = {
            "mean": list(scores),
            "mean of seen": [row for row in scores if row.seen],
            "mean of unseen": [row for row in scores if not row.seen],
        }
        for name, rows in groups.items():
            if rows:
                means = [_percent(unweighted_mean(rows, column), digits) for column in SHARES]
                table.writerow([name, "", "", "", *means])


def markdown(
    scores: Sequence[GeneratorScore], names: Mapping[str, str], rows: Sequence[str], digits: int
) -> str:
    """The papers' table: test sets across, AP and accuracy down, the mean at the end."""
    heads = [escaping.markdown(names.get(row.generator, row.generator)) + "*" * row.seen for row in scores]
    titles = {"ap": "AP", "accuracy": "accuracy"}
    lines = [["", *heads, "mean"], ["---"] * (len(heads) + 2)]
    for name in rows:
        cells = [_percent(getattr(row, name), digits) for row in scores]
        lines.append([titles[name], *cells, _percent(unweighted_mean(list(scores), name), digits)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\nPercent; accuracy at threshold 0.5; mean over the sets, unweighted. * trained on.\n"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def draw_histograms(
    path: Path,
    rows: Mapping[str, Tensor],
    values: Tensor,
    scores: Sequence[GeneratorScore],
    names: Mapping[str, str],
    bins: int,
) -> None:
    """A panel a test set with the histograms of its real and its generated images, all on one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(scores))
    lines = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.3 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = values.min().item(), values.double().quantile(0.995).item()
    high = high if high > low else low + 1.0
    for place, (row, number) in enumerate(zip(scores, rows["generator"].unique().tolist(), strict=True)):
        axes = figure.add_subplot(lines, columns, place + 1)
        mine = rows["generator"] == number
        for label, name, colour in ((0, "real", "#1565c0"), (1, "fake", "#c62828")):
            part = values[mine & (rows["label"] == label)].clamp(max=high).numpy()
            axes.hist(part, bins=bins, range=(low, high), color=colour, alpha=0.55, label=name)
        title = plotted(names.get(row.generator, row.generator)) + (" (seen)" if row.seen else "")
        axes.set_title(f"{title}, AP {_percent(row.ap, 1) or '-'}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
        if place == 0:
            axes.legend(fontsize=8)
    figure.supxlabel(
        "mean squared difference of teacher and student" if values is not rows["score"] else "score"
    )
    figure.savefig(path, dpi=110)
