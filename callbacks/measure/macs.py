"""Multiply-accumulates of a call, counted while it runs."""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Formula = Callable[..., int]
"""FLOPs of an operator's `(*args, out_val=result, **kwargs)`, two a multiply-accumulate."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates: of dense arithmetic, and what would be left if zeros in weights cost nothing.

    `uncounted` names the operators that multiply and have no formula: with any, both numbers are too low.
    """

    total: int
    theoretical_sparse: int
    uncounted: tuple[str, ...] = ()


def count_macs(
    function: Callable[..., Any], *inputs: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Macs:
    """Multiply-accumulates of one call, counted while it runs (also on the meta device).

    Counted are matrix products, convolutions and attention (fused or not), by the operators that really run:
    half the FLOPs of `torch.utils.flop_counter`, and of the operators that its registry leaves out. Norms,
    softmax, activations, pooling and element-wise arithmetic count as nothing, as in the literature. Causal
    and masked attention counts in full. An operator that multiplies by its name and has no formula (a newer
    torch's, a hand-written kernel) counts as nothing too: a warning names it.

    Args:
        function: what to call, in eval mode and without autocast.
        inputs: its arguments.
        weights: tensors whose zeros make an operator cheaper in `theoretical_sparse`; an operator belongs to
            a weight when one of its operands lives in the weight's memory. Others count as dense.
    """
    counter = _MacCounter(_Density(weights or {}))
    with torch.no_grad(), _countable_kernels(function), counter:
        function(*inputs)
    if counter.uncounted:
        calls = ", ".join(f"{name} (calls: {count})" for name, count in sorted(counter.uncounted.items()))
        rank_zero_warn(
            f"MACs are too low: torch {torch.__version__} ran operators that multiply and that no formula is "
            f"known for, they count as 0: {calls}. A formula can be given to them with "
            "`torch.utils.flop_counter.register_flop_formula`."
        )
    return Macs(counter.flops // 2, round(counter.sparse_flops / 2), tuple(sorted(counter.uncounted)))


class _MacCounter(TorchDispatchMode):
    """Sees every operator below autograd, takes composite ones apart and adds up the formulas of the rest.

    Not torch's own `FlopCounterMode`: that counts what it does not know as nothing without a word, stumbles
    over parameters that are a module's input (a detector's queries), and cannot run `flex_attention`.
    """

    supports_higher_order_operators = True

    def __init__(self, density: "_Density") -> None:
        super().__init__()
        self.flops = 0
        self.sparse_flops = 0.0
        self.uncounted: Counter[str] = Counter()
        self._density = density
        self._formulas = _formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        higher_order = not hasattr(func, "overloadpacket")  # an operator that takes functions
        formula = self._formulas.get(func if higher_order else func.overloadpacket)
        if formula is None and not higher_order and _returns_tensors(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            self.sparse_flops += flops * self._density.of(args)
        elif higher_order or multiplies(func.name()):
            self.uncounted[func.name()] += 1
        return result


def _returns_tensors(func: Any) -> bool:
    """Whether it computes; what only asks for sizes, strides or layout is answered by a subclass of tensor
    itself, which would ask again without end.
    """
    return any("Tensor" in str(result.type) for result in func._schema.returns)


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


# What multiplies

_MULTIPLYING = frozenset(
    {"mm", "bmm", "addmm", "addbmm", "baddbmm", "smm", "hspmm", "sspaddmm", "mv", "addmv", "gemm", "gemv"}
    | {"matmul", "dot", "vdot", "vecdot", "tensordot", "einsum", "linear", "qlinear", "bilinear", "trilinear"}
    | {"conv", "qconv", "convolution", "attention", "attn", "sdpa", "mha", "transformer", "moe"}
    | {"lstm", "gru", "rnn"}
)
_PREPARING = frozenset(
    {"prepack", "unpack", "reorder", "convert", "quantize", "flatten", "upsample", "combination"}
)


def multiplies(name: str) -> bool:
    """Whether an operator's name (`namespace::name.overload`) says that most of its work is products.

    >>> multiplies("aten::_scaled_dot_product_flash_attention_for_cpu")
    True
    >>> multiplies("aten::upsample_bilinear2d.vec")
    False
    """
    words = set(re.findall("[a-z]+", name.partition(".")[0].lower()))
    return bool(words & _MULTIPLYING) and not words & _PREPARING


def _formulas() -> dict[Any, Formula]:
    """Torch's formulas, and those of operators that its registry leaves out, where this torch has them."""
    from torch.utils.flop_counter import flop_registry

    known = dict(flop_registry)
    for formula, names in _MORE_FORMULAS.items():
        for name in names:
            namespace, _, operator = name.rpartition(".")
            library = getattr(torch.ops, namespace or "aten")
            if hasattr(library, operator):
                known[getattr(library, operator)] = formula
    return known


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """(..., heads, queries, channels): scores and their product with the values; heads may share keys."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _rows(rows: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """(..., channels in) to (..., channels out), however the matrix is laid out."""
    return 2 * rows.numel() * out_val.shape[-1]


def _groups(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Products of groups, which are a dimension of their own or stretches of one: (m, k) and (k, n) each."""
    rows = left.numel() if right.ndim == 3 or left.ndim == 2 else left[0].numel()
    return 2 * rows * right.shape[-1]


def _filters(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor, **___: Any) -> int:
    """Each output pixel takes one filter: weight (channels out, channels in a group, ...)."""
    return 2 * out_val.numel() * weight[0].numel()


def _matrix_vector(matrix: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(_: Tensor, matrix: Tensor, *__: Any, **___: Any) -> int:
    return 2 * matrix.numel()


def _added_matrices(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _distances(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Every pair of rows: one power and one sum a channel."""
    return 2 * left.numel() * right.shape[-2]


def _trilinear(*args: Any, **_: Any) -> int:
    """Three tensors multiplied over their common shape; the dimensions that each lacks are in a list."""
    shapes = []
    for tensor, missing in zip(args[:3], args[3:6], strict=True):
        for dimension in missing:
            tensor = tensor.unsqueeze(dimension)
        shapes.append(tensor.shape)
    return 2 * prod(torch.broadcast_shapes(*shapes))


def _nothing(*_: Any, **__: Any) -> int:
    return 0


_MORE_FORMULAS: dict[Formula, tuple[str, ...]] = {
    _attention: (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
        "higher_order.flex_attention",
    ),
    _rows: (
        "_int_mm",
        "_scaled_mm_v2",
        "_weight_int8pack_mm",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
        "_weight_int4pack_mm_with_scales_and_zeros",
        "_dyn_quant_matmul_4bit",
        "_mixed_dtypes_linear",
        "linear",
        "mkldnn_linear",
        "mkldnn._linear_pointwise",
        "mkl._mkl_linear",
        "onednn.qlinear_pointwise",
        "quantized.linear",
        "quantized.linear_relu",
        "quantized.linear_dynamic",
        "quantized.linear_relu_dynamic",
        "quantized.linear_dynamic_fp16",
        "quantized.linear_relu_dynamic_fp16",
    ),
    _groups: ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"),
    _filters: (
        "cudnn_convolution_relu",
        "cudnn_convolution_add_relu",
        "mkldnn_convolution",
        "_conv_depthwise2d",
        "conv_depthwise3d",
        "slow_conv3d_forward",
        "slow_conv_dilated2d",
        "slow_conv_dilated3d",
        "torchvision.deform_conv2d",
    ),
    _matrix_vector: ("mv", "dot", "vdot"),
    _added_matrix_vector: ("addmv", "addmv_"),
    _added_matrices: ("addbmm", "addbmm_", "addmm_", "baddbmm_", "_addmm_activation"),
    _distances: ("_cdist_forward", "_euclidean_dist"),
    _trilinear: ("_trilinear",),
    _nothing: ("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"),  # gates; their products are apart
}


@contextlib.contextmanager
def _countable_kernels(function: Callable[..., Any]) -> Iterator[None]:
    """Switch off what hides arithmetic from the counter.

    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` have a fused path for inference that counts as
    nothing, and so do the recurrent layers of oneDNN and cuDNN. Compiled functions run as they are written:
    a compiled graph would hide its operators, and `flex_attention` refuses to compile while it is watched.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if isinstance(function, nn.Module) and any(isinstance(m, nn.RNNBase) for m in function.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # oneDNN's flags warn of Intel's GPUs
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
