"""What a block of a language model gets besides its hidden states: positions, masks, inputs of its own."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """The arguments of a block without its hidden states.

    Attributes:
        arguments: positional ones behind them.
        keywords: those by name.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states behind a block."""
        return hidden_of(block(hidden, *self.arguments, **self.keywords))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: they alone, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def split_call(block: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of a call, whatever the block calls them, and the rest."""
    if arguments:
        return arguments[0], Call(arguments[1:], keywords)
    first = next(iter(inspect.signature(block.forward).parameters))
    name = first if first in keywords else "hidden_states"
    return keywords[name], Call((), {key: value for key, value in keywords.items() if key != name})


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A nest of tuples, lists and dictionaries with its tensors replaced; other objects stay as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, function) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(each, function) for each in value)
    if type(value) is dict:
        return {key: mapped(each, function) for key, each in value.items()}
    return value


def mapped_call(call: Call, function: Callable[[Tensor], Tensor]) -> Call:
    """A call with its tensors replaced."""
    return Call(mapped(call.arguments, function), mapped(call.keywords, function))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a nest, also those of dictionaries and caches that blocks share."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif type(value).__module__.startswith("transformers.") and not isinstance(value, nn.Module):
        yield from tensors_of(getattr(value, "__dict__", {}))


def snapshot(call: Call) -> list[Tensor]:
    """Copies of all tensors that a call brings: blocks may write into what they share."""
    return [tensor.detach().clone() for tensor in tensors_of((call.arguments, call.keywords))]


def leaves(call: Call) -> list[Tensor]:
    """The tensors that `mapped_call` sees, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped_call(call, note)
    return found


def same_tensors(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two calls bring equal tensors."""
    return len(first) == len(second) and all(
        one.shape == two.shape and torch.equal(one, two) for one, two in zip(first, second, strict=True)
    )


def merged(common: Call, own: Call) -> Call:
    """`own` with the tensors of `common` where they are equal, so that only what differs is kept twice."""
    shared = leaves(common)

    def choose(tensor: Tensor) -> Tensor:
        equal = (one for one in shared if one.shape == tensor.shape and torch.equal(one, tensor))
        return next(equal, tensor)

    return mapped_call(own, choose)


def grown_dimensions(one: Call, two: Call) -> list[int | None]:
    """For each tensor of a call the dimension that doubles when the batch does; None where none does."""
    found: list[int | None] = []
    for single, double in zip(leaves(one), leaves(two), strict=False):
        sizes = enumerate(zip(single.shape, double.shape, strict=False))
        changed = [index for index, (before, after) in sizes if after == 2 * before]
        found.append(changed[0] if len(changed) == 1 else None)
    return found


def tiled(call: Call, dimensions: list[int | None], batch: int) -> Call:
    """A call of one segment as one of `batch` segments, see `grown_dimensions`."""
    remaining = iter(dimensions)

    def tile(tensor: Tensor) -> Tensor:
        dimension = next(remaining, None)
        if dimension is None:
            return tensor
        sizes = [batch if axis == dimension else 1 for axis in range(tensor.ndim)]
        if tensor.shape[dimension] > 1:
            return tensor.repeat(*sizes)
        return tensor.expand([batch if size > 1 else -1 for size in sizes])

    return mapped_call(call, tile)


def close_by_token(found: Tensor, wanted: Tensor) -> bool:
    """Whether hidden states (..., hidden) agree, each token by its own size.

    A massive activation in one token excuses no error in others.
    """
    error = (found - wanted).abs().amax(-1).double()
    size = wanted.abs().amax(-1).double()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(wanted.dtype, 2e-2)
    return bool((error <= tolerance * size + 1e-12).all())
