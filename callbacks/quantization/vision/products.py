"""Attention's matrix products as modules, in networks that were written without any.

Attention is found by what it computes, not by its class: `scaled_dot_product_attention`, or a product whose
result goes through a softmax into a second product. The module that computes it is given a list `products`
and a class of its own, whose forward pass sends these calls through the list (a TorchFunctionMode); fused
attention is computed in its three steps. Names of parameters do not change, and the module stays an instance
of its class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from callbacks.quantization.vision.operands import Operand

SDPA = F.scaled_dot_product_attention
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


class Product(nn.Module):
    """A @ B, of quantized operands where there are some.

    Args:
        after_softmax: A are probabilities.
    """

    left: Operand | None
    right: Operand | None

    def __init__(self, after_softmax: bool) -> None:
        super().__init__()
        self.after_softmax = after_softmax
        self.register_module("left", None)
        self.register_module("right", None)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(..., n, d) and (..., d, m) to (..., n, m)."""
        b = b if self.right is None else self.right(b)
        if self.left is None:
            return a @ b
        return self.left(a) @ b


class CallMode(TorchFunctionMode, ABC):
    """Gets every call of torch's functions while it is entered."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What `call` makes of it."""
        return self.call(func, args, kwargs or {})

    @abstractmethod
    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Answer a call in the place of `func`."""


class ProductMode(CallMode):
    """Sends the matrix products of one module's forward pass through its list, in the order of the calls.

    Args:
        products: one for every call of a product; None where it is no attention.
    """

    _running: ClassVar[list[Any]] = []  # modes, and None for `no_products`

    def __init__(self, products: Sequence[Product | None]) -> None:
        super().__init__()
        self._products = products
        self._calls = 0

    def __enter__(self) -> "ProductMode":
        self._running.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._running.pop()
        super().__exit__(*exception)

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The call, by way of its product if it has one."""
        if self._running[-1] is not self or (func is not SDPA and func not in MATMULS):
            return func(*args, **kwargs)
        if func is SDPA:
            first, second = self._next(), self._next()
            if first is None or second is None:
                return func(*args, **kwargs)
            return attention(first, second, *args, **kwargs)
        product = self._next()
        return func(*args, **kwargs) if product is None else product(*args, **kwargs)

    def _next(self) -> Product | None:
        self._calls += 1
        if self._calls > len(self._products):
            return None  # what calibration did not see, such as another policy's similarities
        return self._products[self._calls - 1]


@contextmanager
def no_products() -> Iterator[None]:
    """Matrix products in here are nobody's attention."""
    ProductMode._running.append(None)
    try:
        yield
    finally:
        ProductMode._running.pop()


def attention(
    first: Product,
    second: Product,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in its three steps, without dropout."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    logits = first(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return second(logits.softmax(-1), value)


class WithProducts(nn.Module):
    """Mixed into the class of a module that computes attention."""

    products: Any
    product_calls: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        calls = [None if number is None else self.products[number] for number in self.product_calls]
        with ProductMode(calls):
            return super().forward(*args, **kwargs)


_CLASSES: dict[type, type] = {}


def install_products(module: Any, calls: Sequence[str | None]) -> None:
    """Make the products of a module's forward pass modules of a list `products`.

    Args:
        module: computes them itself, not in a part of it.
        calls: for every product in its order: `logits`, `values`, or None for what is no attention.
    """
    kind = type(module)
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Quantized{kind.__name__}", (WithProducts, kind), {})
    numbers = iter(range(len(calls)))
    module.product_calls = tuple(None if call is None else next(numbers) for call in calls)
    module.products = nn.ModuleList(Product(call == "values") for call in calls if call is not None)
    module.__class__ = _CLASSES[kind]
