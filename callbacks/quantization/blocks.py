"""The transformer blocks of a causal language model, run one after another on cached hidden states."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.quantization.calls import (
    Call,
    close_by_token,
    grown_dimensions,
    hidden_of,
    merged,
    same_tensors,
    snapshot,
    split_call,
    tiled,
)
from callbacks.quantization.experts import Expert, expose_experts
from callbacks.quantization.folding import FoldTrial
from callbacks.quantization.layers import matrix_of
from callbacks.quantization.scheme import LAYERS
from lightning_modules.language_model import overflow
from lightning_modules.parts.frozen import evaluating


class _Stop(Exception):
    """Leaves a forward pass at the first block."""


@dataclass
class _Record:
    """A forward pass: the call of each block, copies of its tensors, and what the last block gave."""

    calls: list[Call]
    tensors: list[list[Tensor]]
    outputs: list[Tensor]


_TOWERS = re.compile("vision|visual|image|audio|speech|encoder_only|mtp")


def find_blocks(network: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks of the text model.

    The list has as many members as the configuration says, or its members have one class; what is inside other
    lists (experts), in towers for pictures and sounds, or outside of the decoder comes last; then the longest.

    Args:
        network: a causal language model of transformers.
        path: of the list, where that is not the right one.

    Raises:
        MisconfigurationException: there is none, or `path` is something else.
    """
    lists = {
        name: part for name, part in network.named_modules() if isinstance(part, nn.ModuleList) and len(part)
    }
    if path is not None:
        path = path.removeprefix("network.")
        if path not in lists:
            raise MisconfigurationException(
                f"blocks: '{path}' is no ModuleList; there are {', '.join(lists)}."
            )
        return path, lists[path]
    count = _layer_count(network)
    usable = {
        name: part
        for name, part in lists.items()
        if len(part) == count or len({type(block) for block in part}) == 1
    }
    if not usable:
        raise MisconfigurationException(
            f"{type(network).__name__} has no ModuleList of blocks of one class: give its path as `blocks`."
        )
    decoder = _decoder(network)

    def merit(name: str) -> tuple[bool, bool, bool, bool, int]:
        nested = any(name.startswith(f"{other}.") for other in lists)
        tower = _TOWERS.search(name) is not None
        return (
            not nested,
            not tower,
            decoder is None or name in decoder,
            len(lists[name]) == count,
            len(lists[name]),
        )

    name = max(usable, key=merit)
    return name, lists[name]


def _layer_count(network: nn.Module) -> int | None:
    config: Any = getattr(network, "config", None)
    return getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None


def _decoder(network: nn.Module) -> set[str] | None:
    """Paths inside the text model, where transformers names one."""
    find = getattr(network, "get_decoder", None)
    try:
        decoder = find() if find is not None else None
    except Exception:  # families without one fail in their own way
        return None
    if decoder is None or decoder is network:
        return None
    inside = set(decoder.modules())
    return {name for name, part in network.named_modules() if part in inside}


def linear_layers(network: nn.Module, blocks_path: str, routers: bool = False) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks by its name in the network.

    Experts that are kept as one 3-D parameter get a layer for each of their matrices, see `experts`.

    Args:
        network: of the blocks.
        blocks_path: of their list.
        routers: with the layers that choose experts, which are small and decide much.

    Raises:
        MisconfigurationException: there is none; an already quantized model has other types.
    """
    prefix = f"{blocks_path}."
    expose_experts(network, prefix)
    inside = {name: part for name, part in network.named_modules() if name.startswith(prefix)}
    weights = [part.weight for part in inside.values() if isinstance(part, (*LAYERS, Expert))]
    if any(weight.is_meta for weight in weights if isinstance(weight, Tensor)):
        raise MisconfigurationException(
            "The model is on the meta device: load its weights before quantizing."
        )
    layers = {name: part for name, part in inside.items() if is_linear(part)}
    if not layers:
        kinds = sorted({type(part).__name__ for part in inside.values()})
        raise MisconfigurationException(
            f"There is no Linear layer in '{blocks_path}', only {', '.join(kinds)}: is the model quantized "
            "already?"
        )
    experts = _expert_count(network)
    return {name: part for name, part in layers.items() if routers or not _is_router(name, part, experts)}


@torch.no_grad()
def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies by its weight, adds its bias, and does nothing else (Falcon's has a class of
    its own).
    """
    if isinstance(layer, Expert) or type(layer) in LAYERS:
        return True
    if not isinstance(layer, nn.Linear) or not isinstance(layer.weight, Tensor) or layer.weight.ndim != 2:
        return False
    x = torch.linspace(-1, 1, 2 * layer.weight.shape[1]).view(2, -1).to(layer.weight)
    try:
        found, wanted = layer(x), F.linear(x, layer.weight, layer.bias)
    except Exception:  # a quantized layer, or one that takes more than its input
        return False
    return isinstance(found, Tensor) and found.shape == wanted.shape and close_by_token(found, wanted)


@torch.no_grad()
def idle_layers(network: nn.Module, names: Sequence[str], device: torch.device) -> list[str]:
    """Those of the layers that a forward pass leaves out; experts, which may not be chosen, are not counted."""
    seen: set[str] = set()
    alone = [name for name in names if "expert" not in name]
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        for name in alone
    ]
    size = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = (torch.arange(8, device=device) % size)[None]
    try:
        with evaluating(network):
            network(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in alone if name not in seen]


def _expert_count(network: nn.Module) -> int:
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if config is not None else None
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = (getattr(text, name, None) for name in names)
    return max((count for count in counts if isinstance(count, int)), default=0)


def _is_router(name: str, layer: nn.Module, experts: int) -> bool:
    """Whether a layer chooses experts, or weighs a shared one."""
    parts = name.split(".")
    if isinstance(layer, Expert):
        return False
    return "router" in parts or (
        experts > 0 and parts[-1].endswith("gate") and len(matrix_of(layer)) in (1, experts)
    )


class BlockStack:
    """Runs ranges of blocks as the model itself would.

    Everything besides the hidden states is recorded for one segment where it is the same for all of them, and
    for every segment where it is not (per-layer inputs); all segments have one length and no padding. A second
    segment is run through the blocks, and must come out as it does in the model.

    Args:
        network: causal language model of transformers.
        path: of the blocks.
        segments: token ids (segments, length), those that will be run, or one of them.
        device: where blocks run.
        autocast: type of the matrix products; None is the weights' own.
        offload: blocks that `keep` does not name wait in the CPU's memory, and come to the device to run.

    Raises:
        MisconfigurationException: a second segment comes out differently, a block is not run once, or hidden
            states overflow.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str,
        segments: Tensor,
        device: torch.device,
        autocast: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        self.network = network
        self.path = path
        self.device = device
        self.autocast = autocast
        self.offload = offload
        self._kept = range(len(self.blocks))
        with evaluating(network):
            first = self._record(segments[:1])
            self._calls = first.calls
            doubled = self._record(segments[:1].expand(2, -1))
            self._growing = list(map(grown_dimensions, first.calls, doubled.calls))
            self._batched: dict[int, list[Call]] = {}
            self._own: list[list[Call]] = []  # where they differ, those of each segment
            self._verify(segments, first)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks as they are now."""
        return self.network.get_submodule(self.path)  # type: ignore[return-value]

    def name(self, index: int) -> str:
        """Path of a block."""
        return f"{self.path}.{index}"

    def layer_names(self, index: int, names: Sequence[str]) -> list[str]:
        """Those of `names` that lie in a block."""
        return [name for name in names if name.startswith(f"{self.path}.{index}.")]

    # What blocks get

    @torch.no_grad()
    def _record(self, ids: Tensor, disturb: bool = False) -> "_Record":
        """What all blocks get for token ids (batch, length), and what the last of them gives.

        Args:
            ids: token ids.
            disturb: change what the first block gives, to see what later blocks take from it.
        """
        record, order = _Record([], [], []), []

        def keep(index: int, block: nn.Module, arguments: tuple, keywords: dict) -> None:
            _, call = split_call(block, arguments, keywords)
            record.calls.append(call)
            record.tensors.append(snapshot(call))
            order.append(index)

        def grow(block: nn.Module, arguments: tuple, output: Any) -> Any:
            hidden = 1.5 * hidden_of(output)
            return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

        handles = [
            block.register_forward_pre_hook(partial(keep, index), with_kwargs=True)
            for index, block in enumerate(self.blocks)
        ]
        last = self.blocks[-1]
        handles.append(last.register_forward_hook(lambda *given: record.outputs.append(hidden_of(given[2]))))
        if disturb:
            handles.append(self.blocks[0].register_forward_hook(grow))
        try:
            self.network(ids.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if order != list(range(len(self.blocks))):
            raise MisconfigurationException(
                f"{type(self.network).__name__} runs {len(order)} of its {len(self.blocks)} blocks in "
                "a forward pass, or in another order: give the right list as `blocks`."
            )
        return record

    def _verify(self, segments: Tensor, first: "_Record") -> None:
        """Run two segments through the blocks, in turn; record every segment where they get different things.

        Raises:
            MisconfigurationException: it does not come out as in the model.
        """
        other = segments[:1].flip(1)
        record = self._record(other)
        differ = not all(map(same_tensors, first.tensors, record.tensors))
        if differ:
            disturbed = self._record(other, disturb=True)
            if not all(map(same_tensors, record.tensors, disturbed.tensors)):
                raise self._refusal("a block hands more to later blocks than its hidden states")
            self._own = [first.calls, record.calls]
        autocast, self.autocast = self.autocast, None
        try:
            hidden = [self.embed(ids) for ids in (segments[:1], other)]
            if hidden[0].ndim != 3 or hidden[0].shape[:2] != other.shape:
                raise self._refusal(f"its hidden states have the shape {tuple(hidden[0].shape)}")
            for index in range(len(self)):  # in turn, so that nothing is handed on beside the hidden states
                hidden = [self.run(index, index + 1, each, slice(n, n + 1)) for n, each in enumerate(hidden)]
        except MisconfigurationException:
            raise
        except Exception as error:  # a block that does not run alone fails in its own way
            raise self._refusal(f"its blocks do not run alone ({' '.join(str(error).split())})") from error
        finally:
            self.autocast = autocast
        for found, wanted in zip(hidden, (first.outputs[-1], record.outputs[-1]), strict=True):
            if found.shape != wanted.shape or not close_by_token(found, wanted):
                raise self._refusal("a second segment comes out of the blocks otherwise than of the model")
        if differ:
            records = (self._record(ids).calls for ids in segments.split(1))
            self._own = [list(map(merged, self._calls, calls)) for calls in records]

    def _refusal(self, reason: str) -> MisconfigurationException:
        return MisconfigurationException(
            f"The blocks of {type(self.network).__name__} ('{self.path}') cannot be calibrated one after "
            f"another: {reason}. Use RTN, which needs no calibration."
        )

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block: (batch, length, hidden) of token ids (batch, length)."""
        entered: list[Tensor] = []

        def stop(block: nn.Module, arguments: tuple, keywords: dict) -> None:
            entered.append(split_call(block, arguments, keywords)[0])
            raise _Stop

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.network(ids.to(self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return entered[0]

    def run(self, start: int, end: int, hidden: Tensor, indices: Any = None) -> Tensor:
        """Hidden states (batch, length, hidden) behind the blocks `start` .. `end - 1`.

        Args:
            start: first block.
            end: the block behind the last.
            hidden: (batch, length, hidden).
            indices: of the segments that `hidden` belongs to, a slice or a tensor; None: the first ones.

        Raises:
            MisconfigurationException: they are not finite in float16.
        """
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            for index in range(start, end):
                block, visits = self.blocks[index], index not in self._kept
                if visits:
                    block.to(self.device)
                hidden = self._run_block(index, block, hidden, indices)
                if visits:
                    block.to("cpu")
                if hidden.dtype == torch.float16 and not bool(hidden.isfinite().all()):
                    raise overflow(index)
        return hidden

    def _run_block(self, index: int, block: nn.Module, hidden: Tensor, indices: Any) -> Tensor:
        if not self._own:
            return self._call(index, len(hidden)).run(block, hidden)
        rows = range(len(hidden)) if indices is None else torch.arange(len(self._own))[indices].tolist()
        parts = zip(rows, hidden.split(1), strict=True)
        return torch.cat([self._own[row][index].run(block, part) for row, part in parts])

    def _call(self, index: int, batch: int) -> Call:
        """What a block gets besides the hidden states of so many segments, where it is the same for all."""
        if batch == 1:
            return self._calls[index]
        if batch not in self._batched:
            growing = zip(self._calls, self._growing, strict=True)
            self._batched[batch] = [tiled(call, dimensions, batch) for call, dimensions in growing]
        return self._batched[batch][index]

    def trial(self, index: int, hidden: Tensor) -> FoldTrial:
        """A block in double precision with the first segment's hidden states (1, length, hidden)."""
        call = self._own[0][index] if self._own else self._calls[index]
        return FoldTrial(self.blocks[index], call, hidden)

    def keep(self, start: int, end: int) -> None:
        """Have the blocks `start` .. `end - 1` on the device, and no others, if they are to be offloaded."""
        if not self.offload:
            return
        self._kept = range(start, end)
        for index, block in enumerate(self.blocks):
            block.to(self.device if index in self._kept else "cpu")


class HiddenStates:
    """Hidden states of all segments: in memory, or in a memory-mapped file.

    Args:
        shape: (segments, length, hidden).
        dtype: of the store.
        like: device and type of what is read.
        file: where the map is; None is memory.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor, file: str | None = None
    ) -> None:
        self._like = like
        if file is None:
            self.values = torch.empty(shape, dtype=dtype)
        else:
            count = int(torch.Size(shape).numel())
            self.values = torch.from_file(file, shared=True, size=count, dtype=dtype).view(shape)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: Any) -> Tensor:
        """Some segments, (chosen, length, hidden)."""
        return self.values[indices].to(self._like)

    def write(self, indices: Any, hidden: Tensor) -> None:
        """Overwrite some segments."""
        self.values[indices] = hidden.detach().to(device="cpu", dtype=self.values.dtype)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` indices."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
