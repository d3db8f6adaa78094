"""Features of all ranks in one tensor. Every rank must hold a batch of the same size (drop the last one)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank as (ranks B, ...), in rank order, without gradient."""
    if not is_distributed():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank as (ranks B, ...); the gradient flows back to the rank that each part came from.

    A loss of the gathered tensor is the same on every rank, and DDP averages gradients: the summed gradient
    that arrives here makes that average the gradient of the global loss.
    """
    if not is_distributed():
        return tensor
    return _Gather.apply(tensor) if tensor.requires_grad else gather(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, without gradient."""
    tensor = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


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
