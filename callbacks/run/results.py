"""The end of a run: one table for a person, one `results.json` for a program."""

import math
import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.run.device import device_name
from callbacks.run.directory import run_directory, write_json
from featherlight_tables import RESERVED, flatten, human, printable
from lightning_modules.base import Method
from lightning_modules.parts.contracts import HasStartOfText, HasSynthetic, datamodule_of, optional

UNTRAINED = "neither trained nor loaded"


@runtime_checkable
class ReportsResults(Protocol):
    """A callback that has something to say about a run.

    Its part of the report is filed under its `name` if it has one, else under its class name in snake case.
    The table reads units from the keys: `..._seconds` is a time, `..._per_second` a rate, `bytes...` and
    `..._bytes` a size.
    """

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries of them; empty where there is nothing to say.

        Called on every rank once every other callback's `on_test_end` is over (`on_validation_end` in
        `validate`). What rank 0 returns is reported. Fix numbers about the evaluation's batches in
        `on_test_epoch_end`: later, `EfficiencyReport` and `ONNXExport` have sent batches of their own
        through the network.
        """
        ...


class Results(Callback):
    """Collects metrics and every callback's `results` at the end of `test` and `validate`.

    Prints one table and writes `results.json` (after `test`) or `results_validate.json` (after `validate`)
    into the run directory: `stage`, `metrics`, one key a reporting callback, `device`, `versions`,
    `checkpoint`, `weights`, `seed`, `date`, `synthetic_data` where the data were drawn by a program, and
    `add_bos` of a text.
    Numbers are raw in the file; those that are not finite become null, as JSON has no word for them.

    `weights` says where they are from: `random`, `pretrained: NAME`, `file: PATH`, `checkpoint: PATH` or
    `trained`. Random ones are also named above the table, and before a `predict`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind every other callback, so that a drop-in that was added after this one is heard too."""
        # a new list: Lightning is walking through the present one
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a `test`."""
        self._report(trainer, pl_module, "results.json")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a `validate`; the validations inside a `fit` are left to the logger."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module, "results_validate.json")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what predicts."""
        origin = weights_of(trainer, pl_module)
        if origin is not None and origin.startswith("random"):
            rank_zero_warn(f"predict: the weights are {origin}: {UNTRAINED}.")
        elif origin is not None:
            rank_zero_info(f"predict: weights from {origin}.")

    def _report(self, trainer: Trainer, module: LightningModule, file_name: str) -> None:
        if trainer.progress_bar_callback is not None:
            # it has had its own end of the stage; a live bar would be drawn through what follows
            trainer.progress_bar_callback.teardown(trainer, module, str(trainer.state.fn))
        report = collect(trainer, module)
        if trainer.is_global_zero:
            path = run_directory(trainer) / file_name
            write_json(path, report)
            print_table(report, path)


def collect(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The whole report as plain JSON values. Asks every callback, hence to be called on every rank.

    Raises:
        TypeError: a value that JSON has no form for; names the callback and the key.
        MisconfigurationException: a callback reports under a name that the report itself uses.
    """
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    report: dict[str, Any] = {"stage": str(trainer.state.fn.value), "metrics": plain(metrics, "the metrics")}  # type: ignore[union-attr]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ReportsResults):
            continue
        owner = type(callback).__name__
        values = callback.results(trainer, module)
        if not isinstance(values, Mapping):
            raise TypeError(f"{owner}.results() must return a dictionary, not {type(values).__name__}.")
        if values:
            report[_free_key(callback, report)] = plain(values, owner)
    return report | _circumstances(trainer, module)


def weights_of(trainer: Trainer, module: LightningModule) -> str | None:
    """Where the weights that are evaluated come from; None for a module that does not say."""
    if trainer.ckpt_path is not None:
        return f"checkpoint: {trainer.ckpt_path}"
    return module.weights_origin if isinstance(module, Method) else None


def _free_key(callback: object, taken: Mapping[str, Any]) -> str:
    """Key of a callback's part of the report; a second callback of the same name gets `_2`, and so on."""
    name = getattr(callback, "name", None)
    if not isinstance(name, str) or not name:
        name = re.sub(
            r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(callback).__name__
        ).lower()
    if name in RESERVED:
        raise MisconfigurationException(
            f"{type(callback).__name__} reports under the name '{name}', which results.json keeps for "
            f"itself: give it another `name` than {', '.join(RESERVED)}."
        )
    keys = (name, *(f"{name}_{count}" for count in range(2, len(taken) + 2)))
    return next(key for key in keys if key not in taken)


def _circumstances(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Where, with what and when: the keys that make a number reproducible."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    data = optional(datamodule_of(trainer), HasSynthetic)
    text = optional(datamodule_of(trainer), HasStartOfText)
    return {
        "device": {
            "type": module.device.type,
            "name": device_name(module.device),
            "count": trainer.world_size,
            "precision": str(trainer.precision),
        },
        "versions": {
            name: found for name in ("torch", "lightning", "featherlight") if (found := _version(name))
        },
        "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        "weights": weights_of(trainer, module),
        **({"synthetic_data": True} if data is not None and data.synthetic else {}),
        **({} if text is None else {"add_bos": text.starts_text}),
        "seed": None if seed is None else int(seed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def plain(value: Any, owner: str, key: str = "") -> Any:
    """`value` as what JSON can hold: string-keyed dictionaries, lists, strings, finite numbers, booleans,
    None.

    Args:
        value: what a callback returned.
        owner: who returned it, for the error.
        key: where in it we are, such as `layers/0`.

    Raises:
        TypeError: anything else, a tensor for instance; names `owner` and `key`.
    """
    if isinstance(value, Mapping):
        wrong = [name for name in value if not isinstance(name, str)]
        if wrong:
            where = f"'{key}'" if key else "its results"
            raise TypeError(f"{owner}: {where} has the key {wrong[0]!r}; keys of a report are strings.")
        return {name: plain(item, owner, f"{key}/{name}" if key else name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, owner, f"{key}/{place}") for place, item in enumerate(value)]
    # numpy's float64 is a float by inheritance; hand on a plain one
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(
        f"{owner} reports '{key}' as a {type(value).__name__}, which JSON cannot hold: return a number, "
        "string, list or dictionary (`.item()` or `.tolist()` for a tensor)."
    )


# The table


def print_table(report: Mapping[str, Any], path: Path) -> None:
    """Print a report as one table: metrics first, then a section for each callback."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    device = report["device"]
    count = f"{device['count']} x " if device["count"] > 1 else ""
    caption = [f"{count}{device['name']}, {device['precision']}"]
    title, weights = [f"results of {report['stage']}"], report.get("weights")
    if weights is not None:
        caption.append(f"weights: {weights}")
        title += [f"{weights} weights: {UNTRAINED}"] if weights.startswith("random") else []
    table = Table(title=_lines(title), caption=_lines(caption))
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    sections = {"": report["metrics"]} | {key: part for key, part in report.items() if key not in RESERVED}
    for key, part in sections.items():
        for name, value in flatten(part, key):
            table.add_row(Text(printable(name)), Text(printable(human(name, value))))
        table.add_section()
    console = Console()
    console.print(table)
    console.print(f"written to {printable(str(path))}", soft_wrap=True, markup=False, highlight=False)


def _lines(parts: list[str]) -> Any:
    from rich.text import Text

    return Text("\n".join(printable(part) for part in parts))
