"""What a person wants to know of a run: what runs on what, and at its end what came out and what is next."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run.checkpointing import RunCheckpoint
from callbacks.run.device import device_name
from callbacks.run.directory import announce
from callbacks.run.results import weights_of
from featherlight_tables import human


class RunSummary(Callback):
    """Says at the start of a run on which device what runs, with which plug-ins, in which folder.

    What was read is said by the data module. A `fit` ends with three lines: where everything is, which
    checkpoint was best, and what to type next.

    Args:
        plugins: callbacks of the user, which are named.
    """

    def __init__(self, plugins: Sequence[Callback] = ()) -> None:
        self.plugins = [type(plugin).__name__ for plugin in plugins]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what runs on what."""
        self._begin(trainer, pl_module)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it of a `validate`."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where a `fit` that came to its end has left what, and what to do with it."""
        if stage != "fit":
            return
        if trainer.progress_bar_callback is not None:  # a live bar would be drawn through what follows
            trainer.progress_bar_callback.teardown(trainer, pl_module, stage)
        for line in _ending(trainer):
            announce(trainer, line)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        seed = os.environ.get("PL_GLOBAL_SEED")
        announce(trainer, f"device:   {_device(trainer, module)}")
        announce(trainer, f"model:    {_model(trainer, module)}")
        announce(trainer, f"plug-ins: {', '.join(self.plugins) or 'none'}")
        announce(trainer, f"folder:   {trainer.default_root_dir}{f', seed {seed}' if seed else ''}")


def _device(trainer: Trainer, module: LightningModule) -> str:
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    device = trainer.strategy.root_device
    threads = torch.get_num_threads()
    on_cpu = f", {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else ""
    return f"{count}{device.type.upper()}, {device_name(device)}{on_cpu}, precision {trainer.precision}"


def _model(trainer: Trainer, module: LightningModule) -> str:
    """`ImageClassifier test_resnet, 373 k parameters, random weights`."""
    name = module.hparams.get("model")
    counts = [parameter.numel() for parameter in module.parameters()]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    said = f"{type(module).__name__}{f' {name}' if isinstance(name, str) else ''}"
    said += f", {human('parameters', sum(counts))} parameters"
    if trainer.state.fn == "fit" and trained != sum(counts):
        said += f" ({human('parameters', trained)} are trained)"
    origin = weights_of(trainer, module)
    return f"{said}, weights: {origin}" if origin else said


def _ending(trainer: Trainer) -> list[str]:
    run = Path(trainer.default_root_dir)
    there = [name for name in ("config_fit.yaml", "checkpoints", "logs") if (run / name).exists()]
    lines = [f"run:  {run}" + (f" ({', '.join(there)})" if there else "")]
    writer = trainer.checkpoint_callback
    if not isinstance(writer, RunCheckpoint):
        return [*lines, "best: no checkpoint was kept"]
    if writer.monitor is not None and writer.best_model_score is not None:
        best, choice = (
            f"{writer.best_model_path}, {writer.monitor} {float(writer.best_model_score):.4g}",
            "best",
        )
    else:
        why = (
            "checkpoint.monitor chooses none"
            if writer.monitor is None
            else f"no {writer.monitor} was measured"
        )
        best, choice = f"{writer.last_model_path}, the last ({why})", "auto"
    lines.append(f"best: {best}")
    if (run / "config_fit.yaml").exists():
        file = shlex.quote(str(run / "config_fit.yaml"))
        lines.append(f"next: featherlight test --config {file} --ckpt_path {choice}")
    return lines
