"""What all ranks have: tensors gathered with or without gradient, reduced, and rows that each count once."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Key = TypeVar("Key")
Value = TypeVar("Value")
Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# Gathering


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank as (ranks B, ...), in rank order, without gradient; B is the same on each."""
    if not is_distributed():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank as (ranks B, ...); the gradient flows back to the rank that each part came from.

    Every rank must hold a batch of the same size (drop the last one). A loss of the gathered tensor is the
    same on every rank, and DDP averages gradients: the summed gradient that arrives here makes that average
    the gradient of the global loss.
    """
    if not is_distributed():
        return tensor
    return _Gather.apply(tensor) if tensor.requires_grad else gather(tensor)


def gather_uneven(tensor: Tensor) -> Tensor:
    """(n, ...) of every rank, each with an n of its own, as one tensor in rank order; without gradient."""
    if not is_distributed():
        return tensor.detach()
    counts = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = gather(padded).split(max(counts)) if max(counts) else (padded,) * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def rows_of_all_ranks(index: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """`index` and its columns from all ranks, each index once and in ascending order.

    Args:
        index: (n,) position in the data set; a sampler that fills up the ranks gives some of them twice.
        columns: (n, ...) each.
    """
    gathered = [gather_uneven(column) for column in (index, *columns)]
    rows = first_of_each(gathered[0])
    return tuple(column[rows] for column in gathered)


def first_of_each(index: Tensor) -> Tensor:
    """Rows (distinct,) of the first occurrence of every value of `index` (rows,), by value."""
    order = torch.argsort(index, stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = index[order][1:] != index[order][:-1]
    return order[first]


# Reducing


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, without gradient."""
    tensor = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def computed_once(items: Mapping[Key, Value], compute: Callable[[dict[Key, Value]], Result]) -> Result:
    """`compute` of the items of all ranks, on rank 0 alone; its result on every rank.

    Args:
        items: by key; where several ranks have a key, the first one's item counts. Pickle must know them.
        compute: plain arithmetic, without collectives.

    Raises:
        Exception: what `compute` raised, on every rank: none is left waiting.
    """
    if not is_distributed():
        return compute(dict(items))
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(dict(items), parts)
    outcome: list[Any] = [None, None]
    if parts is not None:
        merged = {key: item for part in reversed(parts) for key, item in part.items()}
        try:
            outcome[0] = compute(merged)
        except Exception as error:  # the other ranks wait for an answer, whatever it is
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.count = len(tensor)
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.count :][: ctx.count]
