"""Callbacks that add named terms to the training loss, and the parts that they are made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import Method
from lightning_modules.selection import match


class ObjectiveCallback(Callback, ABC):
    """Attaches an objective to a `Method` for the time of a `fit`.

    A subclass builds the objective: an `nn.Module` with `forward(module, batch, outputs) -> {term: weighted
    scalar}`. The objective's own parameters and buffers are trained and checkpointed with the module under
    `objectives.<name>.`; anything frozen (a teacher) belongs to the callback, see `FrozenNetwork`.

    Args:
        name: of the objective; terms are logged as `train/<name>/<term>`. Two callbacks in a run need two
            names.
    """

    def __init__(self, name: str) -> None:
        self.name = name
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
        pl_module.attach_objective(self.name, self._objective)

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


class FrozenNetwork:
    """A network that is used but never trained, carried outside of every module tree.

    Being no `nn.Module` it appears in no state dict, optimiser, DDP wrapper or weight average; a deep copy
    of its owner shares it.

    Args:
        network: put in eval mode, its parameters lose their gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "FrozenNetwork":
        """Move in place."""
        self.network.to(device=device, dtype=dtype)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass without a graph.

        Raises:
            RuntimeError: something has put the network in training mode.
        """
        if self.network.training:
            raise RuntimeError(f"The frozen {type(self.network).__name__} was put in training mode.")
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "FrozenNetwork":
        return self


class FeatureTaps:
    """Records the outputs of named submodules during a forward pass, by forward hooks.

    Example:
        >>> taps = FeatureTaps(network, ["layer1", "layer4"])
        >>> network(images)
        >>> taps.outputs["layer4"].shape
        >>> taps.remove()

    Args:
        root: paths are relative to it.
        paths: module paths or globs, see `lightning_modules.selection.match`.
    """

    def __init__(self, root: nn.Module, paths: Iterable[str]) -> None:
        modules = dict(root.named_modules())
        self.paths = match([path for path in modules if path], list(paths), "feature taps")
        self.outputs: dict[str, Tensor] = {}
        self._handles = [modules[path].register_forward_hook(self._record(path)) for path in self.paths]

    def _record(self, path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            # gradient checkpointing runs a block twice: the first output is the one that the loss saw
            self.outputs.setdefault(path, output)

        return hook

    def clear(self) -> None:
        """Forget the outputs; call it after every use, so that no graph outlives its step."""
        self.outputs = {}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()
