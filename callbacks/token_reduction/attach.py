"""Puts reducers into the blocks of a timm VisionTransformer, and takes them out again.

Only the classes of the network and of the chosen blocks change, to subclasses that live here; modules,
parameters, buffers and their names stay what they are, so a deep copy, a state dict, hooks and wrappers see
the same network.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

from callbacks.token_reduction.network import (
    NO_CHECKPOINTING,
    CompressingBlock,
    ReducedDistilledTransformer,
    ReducedTransformer,
    Reduction,
)
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.state import TokenRecords


def attach_reducers(
    network: VisionTransformer, reducers: Mapping[int, Reducer], proportional_attention: bool = True
) -> ReducedTransformer:
    """Make `network` remove tokens in the given blocks, in place, without a parameter or buffer of its own.

    Example:
        >>> network = timm.create_model("deit_small_patch16_224")
        >>> attach_reducers(network, {block: PruneOrPool(r=50) for block in (3, 6, 9)})
        >>> logits = network(images)
        >>> detach_reducers(network)

    Args:
        network: a plain, distilled or register-token ViT of timm 1.0. Attaching again with the same settings
            does nothing.
        reducers: `{block index: Reducer}`, counted from 0.
        proportional_attention: add log(size) to the attention logits of the blocks after a merge.

    Returns:
        `network` itself, as what it is now.

    Raises:
        ValueError: an index outside of the network, a part of the network that token reduction does not
            know, or other settings than those that it has already.
    """
    reduction = Reduction(dict(reducers), proportional_attention)
    if isinstance(network, ReducedTransformer):
        if network.token_reduction != reduction:
            raise ValueError(
                f"The network is patched already, with {network.token_reduction}; it cannot also be patched "
                f"with {reduction}. Use one token reduction callback for a network."
            )
        return network
    _check(network, reduction)
    for index, reducer in reduction.reducers.items():
        block = network.blocks[index]
        block.__class__ = CompressingBlock
        vars(block).update(block_index=index, token_reducer=reducer)
    network.__class__ = _reduced_class(type(network))
    vars(network).update(token_reduction=reduction, token_records=None)
    return cast(ReducedTransformer, network)


def detach_reducers(network: VisionTransformer) -> None:
    """Undo `attach_reducers`, bit for bit.

    A network without reducers is left alone, and so is one that `fully_shard` has given classes of its
    own.
    """
    if type(network) not in _REDUCED.values():
        return
    for block in network.blocks.modules():
        if isinstance(block, CompressingBlock):
            block.__class__ = Block  # type: ignore[assignment]
            del block.block_index, block.token_reducer
    del vars(network)["token_reduction"], vars(network)["token_records"]
    network.__class__ = _original_class(type(network))


@contextmanager
def record_tokens(network: VisionTransformer, trace: bool = False) -> Iterator[TokenRecords]:
    """Write down what a reduced network does to the tokens while the context is open.

    Nothing is recorded in compiled or exported code.

    Args:
        network: one with reducers.
        trace: also follow every input token, for pictures.

    Yields:
        records, filled by every forward pass.
    """
    records = TokenRecords(trace)
    vars(network)["token_records"] = records
    try:
        yield records
    finally:
        vars(network)["token_records"] = None


def _check(network: VisionTransformer, reduction: Reduction) -> None:
    """Refuse what token reduction cannot act on, by name."""
    for method in ("forward_features", "forward_intermediates", "_pos_embed"):
        if getattr(type(network), method).__module__ not in _KNOWN_MODULES:
            raise ValueError(
                f"{type(network).__name__}.{method} is not timm's, token reduction does not know it."
            )
    depth = len(network.blocks)
    for index, reducer in reduction.reducers.items():
        if not 0 <= index < depth:
            raise ValueError(
                f"compress_blocks: {index} is no block of this network, which has 0 to {depth - 1}."
            )
        if reducer.needs_class_token and network.cls_token is None:
            raise ValueError(
                f"{type(reducer).__name__} scores tokens by the attention of the class token, and this "
                "VisionTransformer has none (cls_token is None)."
            )
    foreign = sorted(
        {
            f"blocks.{index}{path}: {type(part).__name__}"
            for index, block in enumerate(network.blocks)
            for path, part, known in (("", block, Block), (".attn", getattr(block, "attn", None), Attention))
            if type(part) is not known
        }
    )
    if foreign:
        raise ValueError(
            f"Token reduction knows timm's Block and Attention only, but found {', '.join(foreign)}."
        )
    if network.attn_pool is not None or network.global_pool not in ("token", "avg", "max", ""):
        raise ValueError(
            f"global_pool={network.global_pool!r} is not supported, the pooling would have to weight tokens "
            "by their sizes. Supported are 'token', 'avg', 'max' and ''."
        )
    if network.grad_checkpointing:
        raise ValueError(NO_CHECKPOINTING)


_KNOWN_MODULES = ("timm.models.vision_transformer", "timm.models.deit")
_REDUCED: dict[type, type[ReducedTransformer]] = {
    VisionTransformer: ReducedTransformer,
    VisionTransformerDistilled: ReducedDistilledTransformer,
}


def _reduced_class(kind: type) -> type[ReducedTransformer]:
    """The reduced form of a network class, made once for a user's own subclass."""
    if kind not in _REDUCED:
        _REDUCED[kind] = type(f"Reduced{kind.__name__}", (ReducedTransformer, kind), {})
    return _REDUCED[kind]


def _original_class(kind: type) -> type[VisionTransformer]:
    """The class whose reduced form is `kind`."""
    return next(
        base
        for base in kind.__mro__
        if issubclass(base, VisionTransformer) and not issubclass(base, ReducedTransformer)
    )
