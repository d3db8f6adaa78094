"""A loss over a large batch with the memory of a small one, and the undivided batch's gradients (GradCache).

Features of all micro-batches are computed first, without graph; the loss over them gives the gradient of each
feature; then every micro-batch is computed again, with graph, and that gradient flows on into the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.parts.distributed import is_distributed

Encode = Callable[[dict[str, Any]], dict[str, Tensor]]


def cached_features(
    encode: Encode, batch: Mapping[str, Any], size: int, module: nn.Module
) -> dict[str, Tensor]:
    """What `encode` gives of a batch, computed `size` samples at a time; any loss may be made of it.

    Equal to `encode(batch)` in value and gradient where samples do not meet inside the network: batch norm in
    training mode takes the statistics of a micro-batch, and its running ones are moved once, not twice.
    Random numbers are the same in both passes.

    Args:
        encode: of a micro-batch, named tensors (samples, ...); entries without gradient come as they are.
        batch: tensors (batch, ...) and lists of one entry a sample, all of one length; the rest goes along.
        size: samples of a micro-batch.
        module: whose parameters `encode` uses.

    Raises:
        MisconfigurationException: several ranks, whose gradients are averaged while they are computed.
    """
    if is_distributed():
        raise MisconfigurationException(
            "micro_batch is for one device: with several ranks gradients would be averaged after each part; "
            "set it to null, the batch is spread over the ranks already."
        )
    parts = list(_parts(batch, size))
    names: list[str] = []
    trigger = next(p for p in module.parameters() if p.requires_grad)
    values = _Cached.apply(encode, parts, module, names, trigger)
    return dict(zip(names, values, strict=True))


def _parts(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    count = max(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    for at in range(0, count, size):
        yield {
            key: value[at : at + size] if isinstance(value, Tensor | list) and len(value) == count else value
            for key, value in batch.items()
        }


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encode: Encode, parts: list[dict[str, Any]], module: nn.Module, names: list[str], _: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, ctx.states = [], []
        ctx.cast = {
            "dtype": torch.get_autocast_dtype(_.device.type),
            "enabled": torch.is_autocast_enabled(_.device.type),
        }
        with torch.no_grad(), _statistics_stand_still(module):
            for part in parts:
                ctx.states.append(_random_state(_))
                outputs.append(encode(part))
        names.extend(outputs[0])
        ctx.encode, ctx.parts, ctx.names, ctx.device = encode, parts, names, _.device
        return tuple(torch.cat([output[name] for output in outputs]) for name in names)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        after, at = _random_state(torch.empty(0, device=ctx.device)), 0
        for part, state in zip(ctx.parts, ctx.states, strict=True):
            _restore(state, ctx.device)
            with torch.enable_grad(), torch.autocast(ctx.device.type, **ctx.cast):
                output = ctx.encode(part)
            count = len(output[ctx.names[0]])
            flowing = [
                (output[name], gradient[at : at + count])
                for name, gradient in zip(ctx.names, gradients, strict=True)
                if output[name].requires_grad and gradient is not None
            ]
            torch.autograd.backward([value for value, _ in flowing], [part for _, part in flowing])
            at += count
        _restore(after, ctx.device)
        return (None,) * 5


@contextmanager
def _statistics_stand_still(module: nn.Module) -> Iterator[None]:
    """Running statistics keep their values in the pass that is repeated."""
    norms = [
        part
        for part in module.modules()
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
    ]
    kept = [(part.running_mean, part.running_var, part.num_batches_tracked) for part in norms]
    for part in norms:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(part, name)
            setattr(part, name, None if value is None else value.clone())
    try:
        yield
    finally:
        for part, values in zip(norms, kept, strict=True):
            part.running_mean, part.running_var, part.num_batches_tracked = values


def _random_state(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(tensor.device) if tensor.is_cuda else None


def _restore(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
