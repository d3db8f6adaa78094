"""Experts that are kept as one 3-D parameter, as linear layers: one for each expert and matrix.

They are views: what is written into them is in the parameter, and they have no parameters of their own, so
the network is saved and trained as before. While one of them is watched, learned or has its input quantized,
its product in the experts' own forward pass goes through it.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
)


class Expert(nn.Module):
    """One matrix of a 3-D parameter as a linear layer without bias.

    Args:
        owner: the module with the parameter.
        parameter: its name there.
        index: of the expert.
        transposed: the parameter keeps (d_in, d_out).
    """

    bias = None

    def __init__(self, owner: nn.Module, parameter: str, index: int, transposed: bool) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no child
        self.parameter = parameter
        self.index = index
        self.transposed = transposed

    @property
    def owner(self) -> nn.Module:
        """The module with the parameter."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), a view of the owner's parameter."""
        matrix = self.owner.get_parameter(self.parameter)[self.index]
        return matrix.T if self.transposed else matrix

    def get_parameter(self, target: str) -> Any:
        """The view, which is no parameter of this module."""
        return self.weight if target == "weight" else super().get_parameter(target)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_out) of (..., d_in)."""
        return F.linear(x, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "Expert":
        return self


def stored_parameter(layer: nn.Module) -> nn.Parameter:
    """The parameter that holds a layer's weight; those of one 3-D parameter's experts share it."""
    if isinstance(layer, Expert):
        return layer.owner.get_parameter(layer.parameter)
    return layer.get_parameter("weight")


def _fused(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module that hold a matrix for each expert."""
    if "expert" in type(module).__name__.lower() and not isinstance(module, nn.Linear):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) > 1:
                yield name, parameter


def _is_transposed(module: nn.Module, name: str, shape: torch.Size) -> bool:
    """Whether an expert's matrix is kept as (d_in, d_out): as the module says, else by its sizes."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    outputs = any(part in name for part in ("down", "output", "w2"))
    return hidden is not None and shape[1 if outputs else 2] != hidden and hidden in shape


def expose_experts(network: nn.Module, prefix: str) -> list[str]:
    """Give the 3-D experts below `prefix` linear layers, `<module>.<expert>[.<parameter>]`; the names."""
    names: list[str] = []
    owners = [(name, part) for name, part in network.named_modules() if name.startswith(prefix)]
    for path, owner in owners:
        parameters = dict(_fused(owner))
        if not parameters:
            continue
        if not isinstance(owner, _Routed):
            kind = type(owner)
            owner.__class__ = type(kind.__name__, (_Routed, kind), {"__module__": kind.__module__})
        for name, parameter in parameters.items():
            for index in range(len(parameter)):
                names.append(f"{path}.{index}" if name == "weight" else f"{path}.{index}.{name}")
                _place_expert(owner, name, index, _is_transposed(owner, name, parameter.shape))
    return names


def _place_expert(owner: nn.Module, parameter: str, index: int, transposed: bool) -> None:
    expert = Expert(owner, parameter, index, transposed)
    children = dict(owner.named_children())
    if parameter == "weight":
        if str(index) not in children:
            owner.add_module(str(index), expert)
        return
    if str(index) not in children:
        owner.add_module(str(index), nn.Module())
    place = owner.get_submodule(str(index))
    if parameter not in dict(place.named_children()):
        place.add_module(parameter, expert)


class _Routed(nn.Module):
    """What the class of experts becomes: products with one expert's matrix may go through its layer."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """As before; expert by expert where a layer of theirs does more than multiply."""
        kind: Any = type(self).__mro__[2]
        original = kind.forward
        routes = {
            key: layer
            for name, _ in _fused(self)
            for key, layer in _layers(self, name)
            if not isinstance(layer, Expert) or layer._forward_pre_hooks or layer._forward_hooks
        }
        if not routes:
            return original(self, *arguments, **keywords)
        with _Redirection(self):
            return inspect.unwrap(original)(self, *arguments, **keywords)


def _layers(owner: nn.Module, parameter: str) -> Iterator[tuple[tuple[str, int], nn.Module]]:
    for index in range(len(owner.get_parameter(parameter))):
        path = str(index) if parameter == "weight" else f"{index}.{parameter}"
        yield (parameter, index), owner.get_submodule(path)


class _Redirection(TorchFunctionMode):
    """Sends the products with experts' matrices through their layers.

    Args:
        owner: of the parameters.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.fused = dict(_fused(owner))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            layer = self._layer(
                kwargs.get("weight", args[1] if len(args) > 1 else None), rows_are_outputs=True
            )
            if layer is not None:
                bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
                result = layer(args[0] if args else kwargs["input"])
                return result if bias is None else result + bias
        elif func in _PRODUCTS and len(args) == 2:
            whole = self._whole(args[1])
            if whole is not None:
                layers = [layer for _, layer in _layers(self.owner, whole)]
                return torch.stack([layer(x) for layer, x in zip(layers, args[0], strict=True)])
            layer = self._layer(args[1], rows_are_outputs=False)
            if layer is not None:
                return layer(args[0])
        return func(*args, **kwargs)

    def _whole(self, weight: Any) -> str | None:
        """Name of the parameter that a batched product takes whole."""
        return next((name for name, parameter in self.fused.items() if parameter is weight), None)

    def _layer(self, weight: Any, rows_are_outputs: bool) -> nn.Module | None:
        """The layer of a matrix that is a view of one expert's."""
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        for name, parameter in self.fused.items():
            if weight.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                continue
            index, rest = divmod(
                int(weight.storage_offset()) - int(parameter.storage_offset()), parameter.stride(0)
            )
            expert = Expert(self.owner, name, index, _is_transposed(self.owner, name, parameter.shape))
            matrix = expert.weight if rows_are_outputs else expert.weight.T
            if rest or (weight.shape, weight.stride()) != (matrix.shape, matrix.stride()):
                raise MisconfigurationException(
                    f"{type(self.owner).__name__} multiplies '{name}' in a way that is not known, so its "
                    "experts cannot be calibrated: leave them alone with `ignore`."
                )
            return self.owner.get_submodule(str(index) if name == "weight" else f"{index}.{name}")
        return None
