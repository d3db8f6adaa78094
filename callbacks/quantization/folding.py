"""CFP on activations: scales of outlier channels, folded into the layer that makes the channels (spec 2.8).

The model's function does not change: X_c / s_c meets W[:, c] s_c. Every fold is checked on a segment, and
undone where the block's output moves, as it does where a norm is followed by something that this file does
not know.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from callbacks.quantization.calls import Call, close_by_token, mapped_call
from callbacks.quantization.layers import matrix_of, set_matrix
from callbacks.quantization.outliers import channel_scales, two_sided_scales


@dataclass(frozen=True)
class Fold:
    """Where scales go: the producer divides, the consumers multiply.

    Attributes:
        producer: path in the block of what makes the channels.
        consumers: linear layers that read them, all of them.
        kind: `norm` divides weight and bias, `rows` those of a linear layer, `heads` too, with the value
            heads that grouped queries share.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "rows", "heads"]


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FOLDS = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "norm"),
    Fold("mlp.up_proj", ("mlp.down_proj",), "rows"),
    Fold("self_attn.v_proj", ("self_attn.o_proj",), "heads"),
    Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
    Fold("final_layer_norm", ("fc1",), "norm"),
    Fold("fc1", ("fc2",), "rows"),
    Fold("self_attn.v_proj", ("self_attn.out_proj",), "heads"),
    Fold("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "norm"),
    Fold("input_layernorm", (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj"), "norm"),
)
"""Llama, Mistral, Qwen and their like, OPT (fc2 behind ReLU), Gemma 2 and 3, Cohere (one norm for both halves)."""


class ChannelRange:
    """Largest and smallest value of each input channel of some layers, seen by hooks.

    Args:
        layers: `{name: layer}`.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.largest: dict[str, Tensor] = {}
        self.smallest: dict[str, Tensor] = {}
        self._handles = [
            layer.register_forward_pre_hook(lambda _, arguments, name=name: self._see(name, arguments[0]))
            for name, layer in layers.items()
        ]

    def _see(self, name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).float()
        top, bottom = flat.amax(0), flat.amin(0)
        if name in self.largest:
            top, bottom = torch.maximum(top, self.largest[name]), torch.minimum(bottom, self.smallest[name])
        self.largest[name], self.smallest[name] = top, bottom

    def magnitude(self, name: str) -> Tensor:
        """(channels,) largest absolute value."""
        return torch.maximum(self.largest[name], -self.smallest[name])

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def folds_of(block: nn.Module, quantized: Sequence[str]) -> list[Fold]:
    """The folds that a block has, all of whose consumers are quantized."""
    parts = dict(block.named_modules())
    folds = []
    for fold in FOLDS:
        there = fold.producer in parts and all(name in parts for name in fold.consumers)
        if there and all(name in quantized for name in fold.consumers):
            relu = type(getattr(block, "activation_fn", None)).__name__.startswith("ReLU")
            if fold.producer == "fc1" and not relu:
                rank_zero_warn("CFP: channels behind an activation that is not ReLU are not scaled (fc2).")
                continue
            folds.append(fold)
    return folds


def fold_scales(
    fold: Fold, block: nn.Module, channels: ChannelRange, variant: Literal["paper", "two_sided"], options: Any
) -> Tensor:
    """s_c of a fold, (channels,) of the consumers' input; equal for query heads that share a value head."""
    reader = fold.consumers[0]
    if variant == "two_sided":
        scales = two_sided_scales(channels.largest[reader], channels.smallest[reader])
    else:
        scales, _ = channel_scales(channels.magnitude(reader), **options)
    if fold.kind == "heads":
        head = int(block.get_submodule(fold.producer.rpartition(".")[0]).head_dim)  # type: ignore[arg-type]
        rows = len(matrix_of(block.get_submodule(fold.producer)))
        repeats = len(scales) // rows
        # (value heads, query heads of each, head)
        shared = scales.view(rows // head, repeats, head).amax(1, keepdim=True)
        scales = shared.expand(-1, repeats, -1).flatten()
    return scales


@torch.no_grad()
def scale_norm(norm: nn.Module, divisor: Tensor) -> None:
    """Divide what a norm gives; Gemma's multiplies by one plus its weight, which a norm of zeros shows."""
    weight = norm.get_parameter("weight")
    kept = weight.clone()
    weight.zero_()
    try:
        ones = norm(torch.linspace(-1, 1, len(weight), device=weight.device).to(weight.dtype)[None])
    finally:
        weight.copy_(kept)
    bias = getattr(norm, "bias", None)
    offset = float(bool((ones - (0 if bias is None else bias)).abs().amax() > 0))
    weight.copy_((kept.double() + offset) / divisor - offset)


class FoldTrial:
    """A block in double precision, on which folds are tried before they are made.

    What a block adds to its hidden states must stay the same for every token by its own size: a massive
    activation in one token, or in the residual stream, hides nothing.

    Args:
        block: the block; it is copied.
        call: what it gets besides its hidden states.
        hidden: (1, length, hidden), what enters it.
    """

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        self._block = copy.deepcopy(block).double()
        self._call = mapped_call(call, lambda t: t.double() if t.is_floating_point() else t)
        self._hidden = hidden.double()
        self._before = self._added()

    def _added(self) -> Tensor:
        return self._call.run(self._block, self._hidden) - self._hidden

    @torch.no_grad()
    def moves(self, fold: Fold, scales: Tensor) -> bool:
        """Whether a fold changes what the block does; one that does not stays in the copy."""
        apply_fold(fold, self._block, scales.double())
        if close_by_token(self._added(), self._before):
            return False
        apply_fold(fold, self._block, 1 / scales.double())
        return True


@torch.no_grad()
def apply_fold(fold: Fold, block: nn.Module, scales: Tensor) -> None:
    """Divide in the producer, multiply in the consumers; `1 / scales` undoes it."""
    producer = block.get_submodule(fold.producer)
    divisor = scales
    if fold.kind == "heads":
        head = int(block.get_submodule(fold.producer.rpartition(".")[0]).head_dim)  # type: ignore[arg-type]
        rows = len(matrix_of(producer))
        divisor = scales.view(rows // head, -1, head)[:, 0].flatten()
    if fold.kind == "norm":
        scale_norm(producer, divisor)
    else:
        set_matrix(producer, matrix_of(producer) / divisor[:, None])
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias.div_(divisor)
    for name in fold.consumers:
        consumer = block.get_submodule(name)
        set_matrix(consumer, matrix_of(consumer) * scales)
