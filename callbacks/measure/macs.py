"""Multiply-accumulates of a call, counted while it runs."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates: of dense arithmetic, and what would be left if zeros in weights cost nothing."""

    total: int
    theoretical_sparse: int


def count_macs(
    function: Callable[..., Any], *inputs: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Macs:
    """Multiply-accumulates of one call, counted while it runs (also on the meta device).

    Counted are matrix products, convolutions and attention (fused or not), by the operators that really run:
    half the FLOPs of `torch.utils.flop_counter`. Norms, softmax, activations, pooling and element-wise
    arithmetic count as nothing, as in the literature; so do hand-written kernels that torch has no formula
    for. Causal and masked attention counts in full.

    Args:
        function: what to call, in eval mode and without autocast.
        inputs: its arguments.
        weights: tensors whose zeros make an operator cheaper in `theoretical_sparse`; an operator belongs to
            a weight when one of its operands lives in the weight's memory. Others count as dense.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    density = _Density(weights or {})
    sparse_flops = 0.0

    def weighted(formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            nonlocal sparse_flops
            flops = formula(*args, **kwargs)
            sparse_flops += flops * density.of(args)
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # the counter then hands over tensors, not shapes
        return count

    formulas = {**flop_registry, **_missing_formulas()}
    counter = FlopCounterMode(display=False, custom_mapping={op: weighted(f) for op, f in formulas.items()})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with torch.no_grad(), _countable_kernels(function), counter:
        function(*inputs)
    return Macs(counter.get_total_flops() // 2, round(sparse_flops / 2))


class _NoModules:
    """In place of torch's tracker of modules, which trips over parameters that are a module's input (a
    detector's queries): only totals are wanted here.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Density:
    """Share of non-zeros of the weight that an operator multiplies with; counted once a weight."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {_storage(weight): weight for weight in weights.values() if not weight.is_meta}
        self._known: dict[int, float] = {}

    def of(self, args: tuple[Any, ...]) -> float:
        for tensor in args:
            if isinstance(tensor, Tensor) and (place := _storage(tensor)) in self._weights:
                if place not in self._known:
                    weight = self._weights[place]
                    self._known[place] = int(weight.count_nonzero()) / max(1, weight.numel())
                return self._known[place]
        return 1.0


def _storage(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor: views of a weight have the weight's."""
    return tensor.untyped_storage()._cdata


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of products that torch's registry leaves out."""

    def matrix_vector(matrix: Tensor, *_: Any, **__: Any) -> int:
        return 2 * matrix.numel()

    def added_matrix_vector(_: Tensor, matrix: Tensor, *__: Any, **___: Any) -> int:
        return 2 * matrix.numel()

    def integer_matrices(left: Tensor, right: Tensor, **_: Any) -> int:
        return 2 * left.numel() * right.shape[-1]

    aten = torch.ops.aten
    return {
        aten.mv: matrix_vector,
        aten.dot: matrix_vector,
        aten.addmv: added_matrix_vector,
        aten._int_mm: integer_matrices,
    }


@contextlib.contextmanager
def _countable_kernels(function: Callable[..., Any]) -> Iterator[None]:
    """Switch off what hides arithmetic from the counter.

    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` have a fused path for inference that counts as
    nothing, and so do the recurrent layers of oneDNN and cuDNN.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if isinstance(function, nn.Module) and any(isinstance(m, nn.RNNBase) for m in function.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # oneDNN's flags warn of Intel's GPUs
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
