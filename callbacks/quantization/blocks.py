"""The transformer blocks of a causal language model, run one after another on cached hidden states."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks.quantization.scheme import LAYERS


class _Stop(Exception):
    """Leaves a forward pass at the first block."""


@dataclass
class _Call:
    """What a block gets besides the hidden states: positions, masks."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def find_blocks(network: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks: the longest ModuleList whose members have one class.

    Args:
        network: a causal language model of transformers.
        path: of the list, where the longest is not the right one.

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
    uniform = {name: part for name, part in lists.items() if len({type(block) for block in part}) == 1}
    if not uniform:
        raise MisconfigurationException(
            f"{type(network).__name__} has no ModuleList of blocks of one class: give its path as `blocks`."
        )
    name = max(uniform, key=lambda key: len(uniform[key]))
    return name, uniform[name]


def linear_layers(network: nn.Module, blocks_path: str) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks by its name in the network.

    Raises:
        MisconfigurationException: there is none; an already quantized model has other types.
    """
    prefix = f"{blocks_path}."
    layers: dict[str, nn.Module] = {
        name: part
        for name, part in network.named_modules()
        if name.startswith(prefix) and isinstance(part, LAYERS) and type(part) in LAYERS
    }
    if not layers:
        kinds = sorted(
            {type(part).__name__ for name, part in network.named_modules() if name.startswith(prefix)}
        )
        raise MisconfigurationException(
            f"There is no Linear layer in '{blocks_path}', only {', '.join(kinds)}: is the model quantized "
            "already?"
        )
    weights = [part.get_parameter("weight") for part in layers.values()]
    if any(weight.is_meta for weight in weights):
        raise MisconfigurationException(
            "The model is on the meta device: load its weights before quantizing."
        )
    return layers


class BlockStack:
    """Runs ranges of blocks as the model itself would.

    Everything besides the hidden states is recorded once, for one segment, and broadcasts over batches: all
    segments have one length and no padding.

    Args:
        network: in eval mode.
        path: of the blocks.
        example: token ids (1, length) of the segments' length.
        device: where blocks run.
        autocast: type of the matrix products; None is the weights' own.
        offload: blocks that `keep` does not name wait in the CPU's memory, and come to the device to run.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str,
        example: Tensor,
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
        self._calls: list[_Call] = []
        self._record(example)

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

    @torch.no_grad()
    def _record(self, example: Tensor) -> None:
        def keep(block: nn.Module, arguments: tuple, keywords: dict) -> None:
            if arguments:
                arguments = arguments[1:]
            else:
                keywords = {key: value for key, value in keywords.items() if key != "hidden_states"}
            self._calls.append(_Call(arguments, keywords))

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self.blocks]
        try:
            self.network(example.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(self._calls) != len(self.blocks):
            raise MisconfigurationException(
                f"{type(self.network).__name__} runs {len(self._calls)} of its {len(self.blocks)} blocks in "
                "a forward pass: give the right list as `blocks`."
            )

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block: (batch, length, hidden) of token ids (batch, length)."""
        entered: list[Tensor] = []

        def stop(block: nn.Module, arguments: tuple, keywords: dict) -> None:
            entered.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Stop

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.network(ids.to(self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return entered[0]

    def run(self, start: int, end: int, hidden: Tensor) -> Tensor:
        """Hidden states (batch, length, hidden) behind the blocks `start` .. `end - 1`."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            for index in range(start, end):
                call, block, visits = self._calls[index], self.blocks[index], index not in self._kept
                if visits:
                    block.to(self.device)
                output = block(hidden, *call.arguments, **call.keywords)
                hidden = output[0] if isinstance(output, tuple) else output
                if visits:
                    block.to("cpu")
        return hidden

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
