"""Stop a run at the first number that is none: a loss term, without stalling the device, or an output."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """A run whose numbers are no numbers any more; the message says which, and where."""


def verify_outputs(
    outputs: Any, stage: str, batch_idx: int, source: str, metrics: Sequence[str] = ()
) -> None:
    """Refuse to evaluate what is not a number.

    Infinite values pass: a masked class has a logit of minus infinity, an impossible token an infinite
    surprise, and both are compared rightly.

    Args:
        outputs: what a step measured or predicts: tensors by name; anything else is not looked at.
        stage: `val`, `test` or `predict`.
        batch_idx: place of the batch.
        source: of the data.
        metrics: names of what is computed from the outputs.

    Raises:
        NotFiniteError: a tensor holds NaN; names it, the batch and the data.
    """
    if not isinstance(outputs, Mapping):
        return
    tensors = {
        name: value
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    if not tensors:
        return
    counts = torch.stack([value.isnan().sum() for value in tensors.values()]).tolist()
    faults = [
        f"{name} ({count} of {tensors[name].numel()} values)"
        for name, count in zip(tensors, counts, strict=True)
        if count
    ]
    if faults:
        named = ", ".join(f"{stage}/{name}" for name in metrics)
        raise NotFiniteError(
            f"{stage}: NaN in {', '.join(faults)} at batch {batch_idx} of {source}, "
            f"{f'of which {named} would be computed' if named else 'which are no results'}. Usual causes: a "
            "checkpoint of a run that diverged, 16-bit overflow, bad data."
        )


class FiniteGuard:
    """Watches the terms of a step and raises before the optimiser uses them.

    On a GPU the terms travel to the host while the backward pass is running, so that `verify` (called after
    backward was queued) waits for the forward pass only.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._where = ""
        self._values: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def watch(self, terms: Mapping[str, Tensor], batch_idx: int, source: str) -> None:
        """Remember the terms (scalars) of this step, and where they come from."""
        self._names = list(terms)
        self._where = f"batch {batch_idx} of {source}"
        values = torch.stack([term.detach().float() for term in terms.values()])
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = values

    def verify(self) -> None:
        """Check what was watched last.

        Raises:
            NotFiniteError: a term is NaN or infinite; names the term, the batch and the data.
        """
        if self._values is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        values, self._values, self._copied = self._values.tolist(), None, None
        if all(abs(value) < float("inf") for value in values):
            return
        faults = [
            f"{name} = {value}"
            for name, value in zip(self._names, values, strict=True)
            if not abs(value) < float("inf")
        ]
        raise NotFiniteError(
            f"Loss term not finite: {', '.join(faults)}, at {self._where}. The run stops here, before the "
            "optimiser "
            "step; the last checkpoint is untouched. Usual causes: a learning rate too high, 16-bit "
            "overflow, bad data."
        )

    def __deepcopy__(self, memo: dict) -> "FiniteGuard":
        return FiniteGuard()
