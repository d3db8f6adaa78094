"""Networks that are used but not trained: never, or not now."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import nn


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


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Every part of a network in eval mode inside the block, and each as it was behind it."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def weights_digest(network: nn.Module) -> str:
    """A short hash of all parameters and buffers, by name and content."""
    digest = blake2b(digest_size=8)
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
