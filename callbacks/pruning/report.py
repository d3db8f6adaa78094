"""What a pruned network looks like: sparsity and rank of every layer, as numbers and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from callbacks.pruning.rank_loss import as_matrix, delta_rank, effective_rank, energies
from callbacks.run.directory import replaced_atomically

_LARGEST_SIDE = 2048  # the spectrum of a larger matrix takes seconds on a CPU


def layer_table(weights: Mapping[str, Tensor], ranks: bool = True) -> list[dict[str, Any]]:
    """One row a weight: `name`, `shape`, `weights`, `zeros`, `sparsity`, and the ranks.

    Args:
        weights: by name.
        ranks: add `max_rank` (the smaller side of the matrix), `delta_rank` (tolerance 0.1) and
            `effective_rank`; the latter two are None where the smaller side exceeds 2048.
    """
    rows = []
    for name, weight in weights.items():
        zeros = int((weight.detach() == 0).sum())
        row: dict[str, Any] = {
            "name": name,
            "shape": list(weight.shape),
            "weights": weight.numel(),
            "zeros": zeros,
            "sparsity": zeros / weight.numel(),
        }
        if ranks:
            row |= rank_columns(weight)
        rows.append(row)
    return rows


def rank_columns(weight: Tensor) -> dict[str, int | float | None]:
    """`max_rank`, `delta_rank` and `effective_rank` of one weight."""
    side = min(as_matrix(weight).shape)
    if side > _LARGEST_SIDE:
        return {"max_rank": side, "delta_rank": None, "effective_rank": None}
    spectrum = energies(weight)
    return {"max_rank": side, "delta_rank": delta_rank(spectrum), "effective_rank": effective_rank(spectrum)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals of a `layer_table`: `sparsity`, `zeros`, `weights`, and the mean ranks where all are known."""
    weights = sum(row["weights"] for row in rows)
    zeros = sum(row["zeros"] for row in rows)
    totals = {"sparsity": zeros / weights, "zeros": zeros, "weights": weights}
    for column in ("delta_rank", "effective_rank"):
        values = [row[column] for row in rows if row.get(column) is not None]
        if len(values) == len(rows):
            totals[f"mean_{column}"] = sum(values) / len(values)
    return totals


def report_of(weights: Mapping[str, Tensor], ranks: bool = True) -> dict[str, Any]:
    """The totals of a `layer_table`, and its rows as `layers`."""
    rows = layer_table(weights, ranks)
    return summary(rows) | {"layers": rows}


def draw_run(
    label: Path,
    history: Sequence[Sequence[float]],
    target: float,
    last_step: int,
    weights: Mapping[str, Tensor],
    ranks: bool,
) -> None:
    """The two pictures of a run, `<label>_schedule.png` and `<label>_layers.png`.

    Args:
        label: folder and beginning of their names.
        history: see `plot_schedule`.
        target: density at the end.
        last_step: of the run.
        weights: by name, as they are at the end.
        ranks: see `layer_table`.
    """
    plot_schedule(history, target, last_step, label.with_name(f"{label.name}_schedule.png"))
    plot_layers(layer_table(weights, ranks), label.with_name(f"{label.name}_layers.png"))


def plot_schedule(history: Sequence[Sequence[float]], target: float, last_step: int, path: Path) -> None:
    """PNG of density and drop fraction over the optimiser steps.

    Args:
        history: rows of step, density, drop fraction: the start, then one an update.
        target: density, drawn as a line.
        last_step: of the run.
        path: of the file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    steps, densities, fractions = (list(column) for column in zip(*history, strict=True))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.step(
        [*steps, max(last_step, steps[-1])],
        [*densities, densities[-1]],
        where="post",
        color="tab:blue",
        label="density",
    )
    axis.axhline(target, color="tab:gray", linestyle=":", label=f"target {target:.3g}")
    axis.set(xlabel="optimiser step", ylabel="share of weights kept", yscale="log", ylim=(target / 1.5, 1.2))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    handles, labels = axis.get_legend_handles_labels()
    if any(fractions):
        moved = axis.twinx()
        moved.plot(steps[1:], fractions[1:], color="tab:orange", label="dropped and regrown")
        moved.set(ylabel="share of a layer's weights that moves", ylim=(0, None))
        more = moved.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axis.legend(handles, labels, loc="upper right")
    _save(figure, path)


def plot_layers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PNG of every layer's density, and its ranks as a share of the largest possible one.

    Args:
        rows: a `layer_table`.
        path: of the file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(max(6, 0.22 * len(rows) + 3), 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    densities = [(index, 1 - row["sparsity"]) for index, row in enumerate(rows) if row["sparsity"] < 1]
    if densities:
        upper.plot(*zip(*densities, strict=True), marker="o", markersize=4, linestyle="", color="tab:blue")
        shares = [share for _, share in densities]
        upper.set_ylim(min(shares) / 1.5, min(1.2, 1.5 * max(shares)))
    upper.axhline(1 - summary(rows)["sparsity"], color="tab:gray", linestyle=":", label="all layers")
    upper.set(ylabel="share of weights kept", yscale="log")
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    upper.yaxis.set_minor_formatter(NullFormatter())
    upper.legend()
    for column, label, colour in (
        ("delta_rank", "delta-rank (0.1)", "tab:green"),
        ("effective_rank", "effective rank", "tab:red"),
    ):
        known = [
            (index, row[column] / row["max_rank"])
            for index, row in enumerate(rows)
            if row.get(column) is not None
        ]
        if known:
            lower.plot(*zip(*known, strict=True), marker="o", markersize=3, color=colour, label=label)
    lower.set(ylabel="share of full rank", ylim=(0, 1.02))
    if lower.get_legend_handles_labels()[0]:
        lower.legend()
    names = [str(row["name"]).removesuffix(".weight") for row in rows]
    lower.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with replaced_atomically(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
