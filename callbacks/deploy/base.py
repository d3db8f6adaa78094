"""When exporters act, and in which state they find the module."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.parts.frozen import evaluating
from lightning_modules.parts.strategies import is_sharded


class Exporter(Callback, ABC):
    """Exports once, after `test` or after `fit`.

    Args:
        when: after which.
    """

    def __init__(self, when: Literal["test", "fit"]) -> None:
        self.when = when
        self._report: dict[str, Any] = {}

    def check_ready(self, trainer: Trainer, packages: Sequence[str]) -> None:
        """Fail before the work, not after it.

        Args:
            trainer: of the run.
            packages: of the extra `export` that the export imports.

        Raises:
            ModuleNotFoundError: a package is missing.
            MisconfigurationException: the strategy shards the network.
        """
        name = type(self).__name__
        check_installed(name, packages)
        if is_sharded(trainer.strategy):
            raise MisconfigurationException(
                f"{name} exports no sharded network: run `test` on its checkpoint on one device."
            )

    @abstractmethod
    def export(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the files on rank 0, and keep what `results` says of them."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export after `test`."""
        if self.when == "test":
            self.export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export after `fit`."""
        if self.when == "fit":
            self.export(trainer, pl_module)

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What was written, and how it compares with torch; empty where nothing was exported."""
        return self._report


def check_installed(name: str, packages: Sequence[str]) -> None:
    """Whether packages of the extra `export` are there.

    Raises:
        ModuleNotFoundError: names those that are not.
    """
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if lacking:
        raise ModuleNotFoundError(f"{name} needs {', '.join(lacking)}: pip install featherlight[export]")


@contextmanager
def on_the_cpu(module: LightningModule) -> Iterator[None]:
    """The module on the CPU and in eval mode; it goes back to its device.

    It leaves the stage's inference mode: parameters that moved in it could never be trained again.
    """
    device = module.device
    with torch.inference_mode(False), torch.no_grad(), evaluating(module):
        module.cpu()
        try:
            yield
        finally:
            module.to(device)
