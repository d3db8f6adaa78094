"""Weight averaging that averages weights: parameters and running statistics, and nothing else.

Lightning's `WeightAveraging` averages every buffer. A counter is truncated to an integer on the way, and a
threshold that validation has chosen is averaged with those of times when it was not chosen yet.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

_STATISTICS = ("running_mean", "running_var")


def averaged_tensors(module: nn.Module, every_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what an average is taken of: parameters, then the running statistics of norms.

    Args:
        module: to look at.
        every_name: list a tensor that is shared under each of its names, not only under the first.
    """
    yield from module.named_parameters(remove_duplicate=not every_name)
    for prefix, part in module.named_modules(remove_duplicate=not every_name):
        if isinstance(part, _NormBase):
            for name in _STATISTICS:
                if (values := getattr(part, name)) is not None:
                    yield f"{prefix}.{name}" if prefix else name, values


class AveragedWeights(AveragedModel):
    """torch's AveragedModel of `averaged_tensors`; what else there is stays as it was when this was made."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take one more model into the average; without `use_buffers` the statistics are copied."""
        parameters = {name for name, _ in self.module.named_parameters()}
        pairs = zip(averaged_tensors(self.module), averaged_tensors(model), strict=True)
        for (name, average), (_, values) in pairs:
            values = values.to(average.device)
            if not self.n_averaged or not (self.use_buffers or name in parameters):
                average.copy_(values)
            else:
                self._average(average, values, self.n_averaged.to(average.device))
        self.n_averaged += 1

    def _average(self, average: Tensor, values: Tensor, count: Tensor) -> None:
        if self.multi_avg_fn is not None:
            self.multi_avg_fn([average], [values], count)
        elif self.avg_fn is not None:
            average.copy_(self.avg_fn(average, values, count))
        else:
            average += (values - average) / (count + 1)


class _AveragesWeights(WeightAveraging):
    """What is wrong in Lightning's callback, put right; see the module's docstring."""

    _average_model: AveragedModel | None
    _swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._swapped = False
        if self._average_model is not None:
            self._average_model.__class__ = AveragedWeights

    @torch.no_grad()
    def _swap_models(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._swapped = not self._swapped
        pairs = zip(averaged_tensors(self._average_model.module), averaged_tensors(pl_module), strict=True)
        for (_, average), (_, current) in pairs:
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)

    @torch.no_grad()
    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        pairs = zip(averaged_tensors(self._average_model.module), averaged_tensors(pl_module), strict=True)
        for (_, average), (_, current) in pairs:
            current.copy_(average)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        current = checkpoint.get("current_model_state")
        if self._average_model is None or current is None:
            return
        names = {name for name, _ in averaged_tensors(pl_module, every_name=True)}
        average = checkpoint["state_dict"]
        if self._swapped:  # inside a validation
            exchanged = {name: average[name] for name in names}
            average |= {name: current[name] for name in names}
            checkpoint["current_model_state"] = current | exchanged
        checkpoint["state_dict"] = {
            name: average[name] if name in names else current[name] for name in current
        }


def average_weights_only(trainer: Trainer) -> None:
    """Make every `WeightAveraging` of a trainer right, whichever class of it the user has named.

    The callback keeps its name, options and `should_update`; so do its states in checkpoints.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback)
        if isinstance(callback, WeightAveraging) and not isinstance(callback, _AveragesWeights):
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            callback.__class__ = type(kind.__name__, (_AveragesWeights, kind), names)
