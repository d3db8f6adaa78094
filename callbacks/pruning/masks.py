"""MaskBook: which weights are alive, and everything that has to follow."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class MaskBook:
    """Boolean masks by parameter name, True where a weight is alive; everything is applied in place.

    Example:
        >>> book = MaskBook({"fc.weight": network.fc.weight})
        >>> book["fc.weight"] = network.fc.weight.abs() > 0.01
        >>> book.apply({"fc.weight": network.fc.weight})

    Args:
        parameters: by name; gives shapes and devices. All weights are alive at first.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._alive = {
            name: torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            for name, parameter in parameters.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._alive[name]

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._alive[name].copy_(mask)

    def __iter__(self) -> Iterator[str]:
        return iter(self._alive)

    def __len__(self) -> int:
        return len(self._alive)

    # Numbers

    @property
    def total(self) -> int:
        """Weights in all masks, alive or not."""
        return sum(mask.numel() for mask in self._alive.values())

    def counts(self) -> dict[str, int]:
        """Weights alive, by name."""
        return {name: int(mask.sum()) for name, mask in self._alive.items()}

    def density(self) -> float:
        """Share of the weights that is alive."""
        return sum(self.counts().values()) / self.total

    def checksum(self) -> int:
        """CRC-32 of all masks; equal on two processes if the masks are."""
        return zlib.crc32(torch.cat([pack(mask) for mask in self._alive.values()]).cpu().numpy().tobytes())

    # What follows the masks

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the dead entries of tensors by name (weights, averaged weights)."""
        for name, tensor in tensors.items():
            tensor.mul_(self._alive[name].to(tensor.device))

    @torch.no_grad()
    def clear(self, tensors: Mapping[str, Tensor]) -> None:
        """As `apply`, and leave `+0` where `apply` may leave `-0`: for weights that are to be stored."""
        for name, tensor in tensors.items():
            tensor.masked_fill_(~self._alive[name].to(tensor.device), 0)

    @torch.no_grad()
    def apply_to_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Zero the gradients of dead weights."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._alive[name])

    @torch.no_grad()
    def apply_to_states(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Zero every optimiser state of a dead weight: all state tensors of the parameter's shape.

        These are `momentum_buffer`, `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` and whatever another optimiser
        calls its own, so that a regrown weight starts without a past.
        """
        for name, parameter in parameters.items():
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.mul_(self._alive[name].to(state.device))

    def violations(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that are not zero at a dead entry."""
        revived = {
            name: (tensor.detach() * ~self._alive[name].to(tensor.device)).any()
            for name, tensor in tensors.items()
        }
        return [name for name, nonzero in revived.items() if nonzero]

    # Many processes

    def synchronize(self) -> None:
        """Take over the masks of process 0; nothing happens in a run of one process."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        packed = {name: pack(mask) for name, mask in self._alive.items()}
        together = torch.cat(list(packed.values()))
        dist.broadcast(together, src=0)
        for name, bits in zip(packed, together.split([len(bits) for bits in packed.values()]), strict=True):
            self[name] = unpack(bits, self._alive[name].shape)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """`{name: {"shape": [...], "bits": uint8 tensor}}`, eight weights a byte."""
        return {
            name: {"shape": list(mask.shape), "bits": pack(mask).cpu()} for name, mask in self._alive.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore masks.

        Raises:
            ValueError: names or shapes differ; lists the differences.
        """
        missing = [name for name in self._alive if name not in state]
        unknown = [name for name in state if name not in self._alive]
        differing = [
            f"{name} {list(mask.shape)} (saved: {state[name]['shape']})"
            for name, mask in self._alive.items()
            if name in state and list(mask.shape) != list(state[name]["shape"])
        ]
        faults = {"no saved mask for": missing, "saved masks for": unknown, "other shapes in": differing}
        if any(faults.values()):
            listed = "; ".join(f"{what} {', '.join(names)}" for what, names in faults.items() if names)
            raise ValueError(f"The saved masks do not belong to this selection of layers: {listed}.")
        for name, mask in self._alive.items():
            self[name] = unpack(state[name]["bits"].to(mask.device), mask.shape)


def pack(mask: Tensor) -> Tensor:
    """Eight booleans a byte in memory order, the first in the most significant bit, zeros at the end."""
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = torch.zeros(len(bits), dtype=torch.uint8, device=mask.device)
    for index in range(8):
        packed |= bits[:, index] << (7 - index)
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The booleans of `pack` in their shape."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    count = int(torch.Size(shape).numel())
    return bits.reshape(-1)[:count].bool().reshape(tuple(shape))
