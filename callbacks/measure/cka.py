"""CKAAnalysis: which layers of two networks see the same things (section 3.1 of the OFA-KD paper)."""

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.distillation.cka import MinibatchCKA
from callbacks.distillation.frozen_teacher import build_teacher
from callbacks.run.directory import replaced_atomically, run_directory
from callbacks.run.escaping import cells
from lightning_modules.parts.frozen import FrozenNetwork
from lightning_modules.parts.inference import image_network
from lightning_modules.parts.normalize import knows_statistics, normalized, trained_statistics
from lightning_modules.parts.taps import FeatureTaps

_SMALLEST_BATCH = 4  # of the unbiased estimate


class CKAAnalysis(Callback):
    """Compares the module's network with another one, layer by layer, during `validate`.

    Linear CKA with the unbiased HSIC, summed over mini-batches (`callbacks.distillation.cka.MinibatchCKA`).
    Writes `<name>.csv` (a row for each layer of the module's network, a column for each of the other) and the
    same as a heat map, `<name>.png`, into the run's directory. Batches of fewer than 4 samples are left out.

    Args:
        network: the other network: timm name, or any that takes images; None if `weights` is one of our
            checkpoints.
        weights: `pretrained` (timm's own), a checkpoint file, or None for random.
        layers: globs over the module paths of `module.network`; None takes every block.
        other_layers: the same for the other network.
        network_args: further arguments of timm's model for the other network.
        max_batches: stop after as many; None takes all.
        name: of the files and of the entry in the results.
    """

    def __init__(
        self,
        network: str | nn.Module | None = None,
        weights: str | Path | None = "pretrained",
        layers: list[str] | None = None,
        other_layers: list[str] | None = None,
        network_args: dict[str, Any] | None = None,
        max_batches: int | None = None,
        name: str = "cka",
    ) -> None:
        self.network = network
        self.weights = weights
        self.layers = layers
        self.other_layers = other_layers
        self.network_args = network_args or {}
        self.max_batches = max_batches
        self.name = name
        self._taps: FeatureTaps | None = None
        self._other_taps: FeatureTaps | None = None
        self._results: dict[str, Any] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook both networks.

        Raises:
            MisconfigurationException: the module has no network that takes images.
            ValueError: a glob matches nothing, or the other network cannot be built.
        """
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        own = image_network(pl_module, "CKAAnalysis compares image networks")
        classes = int(pl_module.num_classes)  # type: ignore[arg-type]
        network, label = build_teacher(
            self.network, self.weights, self.network_args, classes, type(self).__name__
        )
        self._statistics = trained_statistics(network) if knows_statistics(network) else None
        self._other = FrozenNetwork(network).to(pl_module.device)
        self._taps = FeatureTaps(own, self.layers or block_paths(own))
        self._other_taps = FeatureTaps(network, self.other_layers or block_paths(network))
        self._sums = MinibatchCKA(len(self._taps.paths), len(self._other_taps.paths))
        self._batches = self._samples = 0
        self._label = label

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch that the module's network has just seen."""
        if self._taps is None or self._other_taps is None:
            return
        images = batch["image"]
        if len(images) >= _SMALLEST_BATCH and self._batches != self.max_batches:
            self._other(self._normalize(images, pl_module))
            self._sums.update(_features(self._taps), _features(self._other_taps))
            self._batches += 1
            self._samples += len(images)
        self._taps.clear()
        self._other_taps.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks and write the files."""
        if self._taps is None or self._other_taps is None:
            return
        rows, columns = self._taps.paths, self._other_taps.paths
        for sums in (self._sums.cross, self._sums.first, self._sums.second):
            sums.copy_(trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum").cpu())
        self._unhook()
        if self._batches == 0:
            rank_zero_warn(
                f"CKAAnalysis saw no batch of at least {_SMALLEST_BATCH} samples: nothing is written."
            )
            return
        matrix = self._sums.compute()
        table, picture = (run_directory(trainer) / f"{self.name}{suffix}" for suffix in (".csv", ".png"))
        if trainer.is_global_zero:
            write_matrix(table, matrix, rows, columns)
            draw_matrix(picture, matrix, rows, columns, type(pl_module.network).__name__, self._label)
        self._results = {
            "network": self._label,
            "samples": self._samples * trainer.world_size,
            "mean": matrix.nanmean().item(),
            "largest": matrix.nan_to_num(-1).max().item(),
            "matrix": str(table),
            "heat_map": str(picture),
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._unhook()

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Mean and largest similarity, and where the matrix is."""
        return self._results

    def _normalize(self, images: Tensor, module: LightningModule) -> Tensor:
        if self._statistics is None:
            return module.normalize(images)  # type: ignore[operator]
        return normalized(images, self._statistics.mean, self._statistics.std)

    def _unhook(self) -> None:
        for taps in (self._taps, self._other_taps):
            if taps is not None:
                taps.remove()
        self._taps = self._other_taps = None


def block_paths(network: nn.Module) -> list[str]:
    """Paths of a network's blocks: composite children of sequences that hold no such sequence themselves.

    For a ResNet `layer1.0`, for a ViT `blocks.0`, for a Swin `layers.0.blocks.0`, for a MobileNet
    `blocks.0.0`.

    Raises:
        ValueError: there are none.
    """
    blocks = [
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if _is_sequence_of_blocks(module)
        for name, child in module.named_children()
        if _is_composite(child) and not any(_is_sequence_of_blocks(inner) for inner in child.modules())
    ]
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no sequence of blocks: name its layers in CKAAnalysis."
        )
    return blocks


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and any(map(_is_composite, module.children()))


def _features(taps: FeatureTaps) -> list[Tensor]:
    wrong = [path for path in taps.paths if not isinstance(taps.outputs.get(path), Tensor)]
    if wrong:
        raise ValueError(
            f"CKAAnalysis: the layers {wrong[:4]} did not run or give no single tensor; leave them out."
        )
    return [taps.outputs[path] for path in taps.paths]


def write_matrix(path: Path, matrix: Tensor, rows: list[str], columns: list[str]) -> None:
    """The matrix as CSV: a header of `columns`, then `row, value, ...`."""
    with replaced_atomically(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(cells(["layer", *columns]))
        for row, values in zip(rows, matrix.tolist(), strict=True):
            writer.writerow(cells([row, *(f"{value:.6f}" for value in values)]))


def draw_matrix(
    path: Path, matrix: Tensor, rows: list[str], columns: list[str], row_title: str, column_title: str
) -> None:
    """The matrix as a heat map; early layers are at the lower left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 0.28 * len(columns), 2 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(torch.nan_to_num(matrix).numpy(), origin="lower", vmin=0, vmax=1, cmap="magma")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    axes.set_title("linear CKA")
    figure.colorbar(shown, ax=axes)
    with replaced_atomically(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
