"""Hidden states of the calibration segments on their way through the blocks (spec 2.4)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from callbacks.quantization.blocks import BlockStack, HiddenStates, chunks
from callbacks.quantization.ranks import rank_and_world

Branch = Literal["full", "quantized"]


class Branches:
    """Two branches, each with its cache and the block that it stands before, and the targets of a window.

    The full branch runs through blocks as they were, the quantized one through blocks as they have become.

    Args:
        stack: of the network.
        segments: this rank's token ids, (segments, length).
        batch_size: segments that pass through blocks at once.
        homologous: keep the second target, too.
        dtype: of the caches.
        directory: keeps them in memory-mapped files there; None is memory.
    """

    def __init__(
        self,
        stack: BlockStack,
        segments: Tensor,
        batch_size: int,
        homologous: bool,
        dtype: torch.dtype = torch.float32,
        directory: Path | None = None,
    ) -> None:
        self.stack = stack
        self.segments = segments
        self.batch_size = batch_size
        self.homologous = homologous
        self.dtype = dtype
        self.directory = directory
        self.positions: dict[Branch, int] = {"full": 0, "quantized": 0}
        self._caches: dict[str, HiddenStates] = {}
        self._target = "target"  # the cache that holds H_fp

    def __len__(self) -> int:
        return len(self.segments)

    def batches(self, part: range | None = None) -> Iterator[slice]:
        """Indices of some segments (None: all), at most `batch_size` at a time."""
        part = range(len(self)) if part is None else part
        for indices in chunks(len(part), self.batch_size):
            yield slice(part.start + indices.start, part.start + indices.stop)

    @torch.no_grad()
    def fill(self) -> None:
        """Both branches in front of the first block."""
        for indices in self.batches():
            hidden = self.stack.embed(self.segments[indices])
            self._cache("full", hidden).write(indices, hidden)
            self._cache("quantized", hidden).write(indices, hidden)

    def _cache(self, name: str, like: Tensor) -> HiddenStates:
        """The cache of a name, made when it is first needed."""
        if name in self._caches:
            return self._caches[name]
        file = None
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = str(self.directory / f"{name}_{rank_and_world()[0]}.bin")
        shape = (len(self), *like.shape[1:])
        self._caches[name] = HiddenStates(shape, self.dtype, like.new_empty(0), file)
        return self._caches[name]

    def clear(self) -> None:
        """Drop the caches; from now on only the positions move."""
        self._caches.clear()

    @torch.no_grad()
    def advance(self, branch: Branch, to: int) -> None:
        """Move a branch to the front of block `to`, if it is not there yet."""
        start = self.positions[branch]
        if self._caches and start < to:
            cache = self._caches[branch]
            for indices in self.batches():
                cache.write(indices, self.stack.run(start, to, cache.read(indices), indices))
        self.positions[branch] = max(start, to)

    @torch.no_grad()
    def set_targets(self, start: int, end: int, following: int) -> None:
        """H_fp and H_homo of a window; the full branch moves on to `following` in the same pass.

        Args:
            start: first block of the window.
            end: the block behind it.
            following: first block of the next window.
        """
        same = start == 0 or self.positions["quantized"] == 0
        full = self._caches["full"]
        self._target = "full" if following == end else "target"  # windows that do not overlap need one cache
        for indices in self.batches():
            hidden = full.read(indices)
            for index in range(start, following):  # block by block, as a resumed run gets there
                full.write(indices, self.stack.run(index, index + 1, hidden, indices))
                hidden = full.read(indices)
            target = self.stack.run(following, end, hidden, indices)
            if following < end:
                self._cache("target", target).write(indices, target)
            if self.homologous:
                if not same:
                    target = self.stack.run(start, end, self.inputs(indices), indices)
                self._cache("homologous", target).write(indices, target)
        self.positions["full"] = following

    def inputs(self, indices: Any) -> Tensor:
        """What the quantized branch gives to the window, (chosen, length, hidden)."""
        return self._caches["quantized"].read(indices)

    def targets(self, indices: Any) -> tuple[Tensor, Tensor | None]:
        """H_fp and, where it is kept, H_homo behind the window, (chosen, length, hidden)."""
        homologous = self._caches["homologous"].read(indices) if self.homologous else None
        return self._caches[self._target].read(indices), homologous
