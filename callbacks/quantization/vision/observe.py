"""What a network computes in which order: one forward pass in which functions and modules are watched."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks.quantization.vision.products import MATMULS, SDPA, SOFTMAXES, CallMode

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Types of layers that can be quantized, and their subclasses that compute the same with `weight`."""

_MIXING = (F.linear, torch.conv2d, F.conv2d, torch.conv_transpose2d, F.conv_transpose2d)


@dataclass
class Observation:
    """What was seen.

    Attributes:
        order: names of the layers, by their first call.
        after_gelu: names of linear layers whose input is a GELU's output.
        folds: `{convolution: batch norm that alone reads it}`.
        products: `{module: for every matrix product "logits", "values" or None}`.
        bytes: `{name: bytes of its inputs and outputs}`.
        skipped: modules whose products are out of reach.
    """

    order: list[str] = field(default_factory=list)
    after_gelu: set[str] = field(default_factory=set)
    folds: dict[str, str] = field(default_factory=dict)
    products: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    skipped: list[str] = field(default_factory=list)


class Observer(CallMode):
    """Watches forward passes while it is entered.

    Args:
        network: what is watched.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.seen = Observation()
        self._stack: list[str] = []
        self._counts: dict[str, int] = defaultdict(int)
        self._kept: list[Any] = []  # tensors stay alive, so that their ids are theirs alone
        self._gelu: set[int] = set()
        self._softmax: dict[int, tuple[str, int]] = {}
        self._logits: dict[int, tuple[str, int]] = {}
        self._made: dict[int, str] = {}
        self._readers: dict[str, list[str]] = defaultdict(list)
        self._norms: dict[str, str] = {}
        self._handles = []
        for name, module in network.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enters(name, module)))
            self._handles.append(module.register_forward_hook(self._leaves(name, module), always_call=True))

    def _enters(self, name: str, module: nn.Module) -> Callable[..., None]:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._stack.append(name)
            self._counts[name] = 0
            if isinstance(module, nn.MultiheadAttention):
                self.seen.skipped.append(name)
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            if first is None:
                return
            if isinstance(module, LAYERS):
                if name not in self.seen.order:
                    self.seen.order.append(name)
                self.seen.bytes[name] += first.nbytes
                if isinstance(module, nn.Linear) and id(first) in self._gelu:
                    self.seen.after_gelu.add(name)
            if is_batch_norm(module) and id(first) in self._made:
                self._norms[self._made[id(first)]] = name

        return enter

    def _leaves(self, name: str, module: nn.Module) -> Callable[..., None]:
        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            self._stack.pop()
            if isinstance(output, Tensor) and isinstance(module, LAYERS):
                self.seen.bytes[name] += output.nbytes
                if isinstance(module, nn.Conv2d):
                    self._made[id(output)] = name
                self._kept.append(output)

        return leave

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The call, and what it says."""
        output = func(*args, **kwargs)
        self._count_readers(args, kwargs)
        if isinstance(output, Tensor):
            self._kept.append(output)
            first = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
            self._tag(func, first, output)
        return output

    def _count_readers(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and id(value) in self._made:
                self._readers[self._made[id(value)]].append(self._stack[-1] if self._stack else "")

    def _tag(self, func: Callable[..., Any], first: Tensor | None, output: Tensor) -> None:
        where = self._stack[-1] if self._stack else ""
        if func is SDPA:
            for kind in ("logits", "values"):
                self._product(where, kind)
            return
        source = id(first)
        if func in MATMULS:
            if source in self._softmax:
                owner, number = self._softmax[source]
                self.seen.products[owner][number] = "logits"
                number = self._product(where, "values")
            else:
                number = self._product(where)
            self._logits[id(output)] = (where, number)
        elif func is F.gelu:
            self._gelu.add(id(output))
        elif first is None or func in _MIXING or output.numel() != first.numel():
            return
        elif func in SOFTMAXES:
            if source in self._logits:
                self._softmax[id(output)] = self._logits[source]
        else:  # scales, masks, dropout, changes of shape
            for tags in (self._logits, self._softmax):
                if source in tags:
                    tags[id(output)] = tags[source]
            if source in self._gelu and func in _UNCHANGED:
                self._gelu.add(id(output))

    def _product(self, where: str, kind: str | None = None) -> int:
        """The number of a product in this call of its module; every call of a module has the same ones."""
        number, kinds = self._counts[where], self.seen.products[where]
        self._counts[where] += 1
        if number == len(kinds):
            kinds.append(kind)
        elif kind is not None:
            kinds[number] = kind
        return number

    def finish(self) -> Observation:
        """Take the hooks off, and say what was seen."""
        for handle in self._handles:
            handle.remove()
        for convolution, norm in self._norms.items():
            readers = self._readers[convolution]
            if all(reader == norm or reader.startswith(f"{norm}.") for reader in readers) and readers:
                self.seen.folds[convolution] = norm
        self._kept.clear()
        return self.seen


_UNCHANGED = (
    F.dropout,
    torch.dropout,
    Tensor.reshape,
    torch.reshape,
    Tensor.view,
    Tensor.flatten,
    torch.flatten,
    Tensor.contiguous,
    Tensor.permute,
    torch.permute,
    Tensor.transpose,
    torch.transpose,
)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm over running statistics, frozen or not, that may be folded."""
    return (
        isinstance(getattr(module, "running_var", None), Tensor)
        and hasattr(module, "eps")
        and (getattr(module, "weight", None) is None or isinstance(module.weight, Tensor))
    )


def observe(network: nn.Module, run: Callable[[], Any]) -> Observation:
    """Watch `network` while `run()` passes something through it, in eval mode."""
    observer = Observer(network)
    try:
        with torch.no_grad(), observer:
            run()
    finally:
        seen = observer.finish()
    return seen
