"""Callbacks that add named terms to the training loss, and the parts that they are made of."""

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_modules.base import Method


class ObjectiveCallback(Callback, ABC):
    """Attaches an objective to a `Method` for the time of a `fit`.

    A subclass builds the objective: an `nn.Module` with `forward(module, batch, outputs) -> {term: weighted
    scalar}`. The objective's own parameters and buffers are trained and checkpointed with the module under
    `objectives.<name>.`; anything frozen (a teacher) belongs to the callback, see `FrozenNetwork`.

    Args:
        name: of the objective; terms are logged as `train/<name>/<term>`. Two callbacks in a run need two
            names.
        optimizer: which of the `optimizer_names` of a method with alternating optimisers the terms are for;
            None in a method with one optimiser.
    """

    def __init__(self, name: str, optimizer: str | None = None) -> None:
        self.name = name
        self.optimizer = optimizer
        self._objective: nn.Module | None = None

    @property
    def state_key(self) -> str:
        """Unique a name, so that several objectives of one class keep their states apart."""
        return f"{type(self).__name__}[{self.name}]"

    @abstractmethod
    def build_objective(self, trainer: Trainer, module: Method) -> nn.Module:
        """The objective; called before the optimisers are made and a checkpoint is restored.

        A second `fit` with the same callback goes on with the objective of the first.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build and attach, in `fit` only."""
        if stage != "fit":
            return
        if not isinstance(pl_module, Method):
            raise MisconfigurationException(
                f"{type(self).__name__} needs a Method to attach to; {type(pl_module).__name__} is none. "
                "Derive it from lightning_modules.base.Method."
            )
        _check_order(trainer, self)
        if self._objective is None:
            self._objective = self.build_objective(trainer, pl_module)
        left_over = self.name in pl_module.objectives and pl_module.objectives[self.name] is self._objective
        if not left_over:  # a run that broke off has no teardown
            pl_module.attach_objective(self.name, self._objective, self.optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        if stage == "fit" and isinstance(pl_module, Method):
            pl_module.detach_objective(self.name)


def _check_order(trainer: Trainer, objective: ObjectiveCallback) -> None:
    """Weight averaging copies the module in its `setup`: what joins it later would be missing there."""
    for callback in getattr(trainer, "callbacks", []):
        if callback is objective:
            return
        if isinstance(callback, WeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} must come after {type(objective).__name__} in the list of "
                "callbacks: it averages the module as it finds it."
            )
