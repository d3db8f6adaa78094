"""Calibration of a vision network: what its layers see, the gradients of its outputs, and the search."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from callbacks.quantization.vision.layers import Captured, QuantizedUnit
from callbacks.quantization.vision.losses import divergence, fisher_loss
from callbacks.quantization.vision.settings import PTQSettings
from lightning_modules.parts.inference import OutputKind

Batch = tuple[Tensor, ...]
Forward = Callable[[Batch], Mapping[str, Tensor]]


class Calibration:
    """Finds the steps of units of a network that is in eval mode and in full precision.

    Args:
        network: whose modules the units are.
        forward: from the inputs of a batch to the named outputs.
        batches: the calibration set.
        kinds: of the outputs.
        settings: of the search.
        cache_bytes: inputs and gradients that are kept at once; more takes further passes.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Forward,
        batches: Sequence[Batch],
        kinds: Mapping[str, OutputKind],
        settings: PTQSettings,
        cache_bytes: int = 2**30,
    ) -> None:
        self._network = network
        self._forward = forward
        self._batches = batches
        self._kinds = kinds
        self._settings = settings
        self._cache_bytes = cache_bytes
        self.passes = 0

    def run(self, units: Mapping[str, QuantizedUnit], sizes: Mapping[str, int]) -> None:
        """Find the steps of all units, and install them.

        Args:
            units: in the order of the search.
            sizes: bytes of what is kept of each.
        """
        if self._settings.needs_gradients and self._settings.grad_source == "sequential_kl":
            full = [self._outputs(batch) for batch in self._batches]
            for name, unit in units.items():
                self._find({name: unit}, full)
                unit.install()
            return
        for group in self._groups(list(units), sizes):
            self._find({name: units[name] for name in group})
        for unit in units.values():
            unit.install()

    def _groups(self, names: list[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
        group: list[str] = []
        held = 0
        for name in names:
            if group and held + sizes.get(name, 0) > self._cache_bytes:
                yield group
                group, held = [], 0
            group.append(name)
            held += sizes.get(name, 0)
        if group:
            yield group

    def _outputs(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(self._forward(batch))

    def _find(self, units: Mapping[str, QuantizedUnit], full: Sequence[Mapping[str, Tensor]] = ()) -> None:
        calls = self._captured(list(units), full)
        for name, unit in units.items():
            if name not in calls:
                raise MisconfigurationException(
                    f"HessianPTQ: '{name}' was not reached by the calibration images; add it to `ignore`."
                )
            unit.set_minmax(calls[name])
            if self._settings.search == "grid":
                unit.search(calls.pop(name), self._settings.options)

    def _captured(
        self, names: list[str], full: Sequence[Mapping[str, Tensor]] = ()
    ) -> dict[str, list[Captured]]:
        """Inputs of every call, and the gradients by its output."""
        generator = torch.Generator().manual_seed(self._settings.seed)
        found: dict[str, list[Captured]] = {}
        for number, batch in enumerate(self._batches):
            self.passes += 1
            with watched(self._network, names) as calls:
                if not self._settings.needs_gradients:
                    self._outputs(batch)
                else:
                    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in batch)
                    outputs = self._forward(inputs)
                    if full:
                        loss = divergence(outputs, full[number], self._kinds)
                    else:
                        loss = fisher_loss(outputs, self._kinds, generator)
                    if not loss.requires_grad:
                        raise MisconfigurationException(
                            f"HessianPTQ: no gradient passes through {type(self._network).__name__}: set "
                            "grad_source: none."
                        )
                    torch.autograd.grad(loss, [x for x in inputs if x.requires_grad], allow_unused=True)
            for name, records in calls.items():
                found.setdefault(name, []).extend(record.captured() for record in records)
        self._check(found)
        return found

    def _check(self, found: Mapping[str, list[Captured]]) -> None:
        for name, calls in found.items():
            if not all(x.isfinite().all() for inputs, gradient in calls for x in (*inputs, gradient)):
                raise MisconfigurationException(
                    f"HessianPTQ: what goes into '{name}', or its gradient, is not finite on the calibration "
                    "images."
                )


class Record:
    """One call of a layer: its inputs, and the gradient that comes back."""

    def __init__(self, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.inputs = tuple(x.detach().clone() for x in inputs if isinstance(x, Tensor))
        self.like = torch.ones((), dtype=torch.float32, device=output.device).expand(output.shape)
        self.gradient: Tensor | None = None
        if output.requires_grad:
            output.register_hook(self._keep)

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()

    def captured(self) -> Captured:
        """Inputs and gradient; ones where all of it is zero, or every error would look like none."""
        gradient = self.gradient
        if gradient is None or not gradient.any():
            gradient = self.like
        return self.inputs, gradient


@contextmanager
def watched(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Record]]]:
    """The calls of some modules while the context is open."""
    calls: dict[str, list[Record]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: calls.setdefault(name, []).append(Record(inputs, output))

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def warn_of_skipped(skipped: Sequence[str]) -> None:
    """Say what stays in full precision because it is out of reach."""
    if skipped:
        rank_zero_warn(
            "HessianPTQ: the products and projections of nn.MultiheadAttention stay in full precision in "
            f"{', '.join(skipped)}."
        )
