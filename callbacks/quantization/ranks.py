"""Calibration on several ranks: each holds its share of the segments, and all end with the same integers."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, distributed

from lightning_modules.parts.options import OptionError


def rank_and_world() -> tuple[int, int]:
    """Of torch.distributed; (0, 1) without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share_of(segments: Tensor) -> Tensor:
    """This rank's segments, every world-size-th, equally many on each rank.

    Raises:
        OptionError: there are fewer segments than ranks.
    """
    rank, world = rank_and_world()
    if len(segments) < world:
        raise OptionError(f"{len(segments)} calibration segments are too few for {world} ranks.")
    rest = len(segments) % world
    if rest:
        rank_zero_warn(
            f"{rest} of {len(segments)} calibration segments are left out: {world} ranks share them."
        )
    return segments[: len(segments) - rest][rank::world]


def average(tensors: Iterable[Tensor]) -> None:
    """Mean over the ranks, in place, in one message."""
    _, world = rank_and_world()
    parts = list(tensors)
    if world == 1 or not parts:
        return
    flat = torch.cat([tensor.flatten() for tensor in parts])
    distributed.all_reduce(flat)
    flat /= world
    for tensor, mean in zip(parts, flat.split([tensor.numel() for tensor in parts]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def total(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if rank_and_world()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def maximum(tensor: Tensor) -> Tensor:
    """Elementwise maximum over the ranks, in place."""
    if rank_and_world()[1] > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return tensor


def of_first_rank(value: Any) -> Any:
    """Rank 0's value, which pickle must know."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
