"""Stop a run at the first loss term that is not finite, without stalling the device."""

from collections.abc import Mapping

import torch
from torch import Tensor


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
            RuntimeError: a term is NaN or infinite; names the term, the batch and the data.
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
        raise RuntimeError(
            f"Loss term not finite: {', '.join(faults)}, at {self._where}. The run stops here, before the "
            "optimiser "
            "step; the last checkpoint is untouched. Usual causes: a learning rate too high, 16-bit "
            "overflow, bad data."
        )

    def __deepcopy__(self, memo: dict) -> "FiniteGuard":
        return FiniteGuard()
