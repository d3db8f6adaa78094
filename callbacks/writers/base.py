"""Predictions of a run, written in pieces while it goes and merged in order by rank 0."""

import contextlib
import json
import shutil
from abc import ABC, abstractmethod
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run.directory import run_directory

if TYPE_CHECKING:
    pass


class PredictionWriter(Callback, ABC):
    """Writes predictions while they are made, in memory that does not grow with the images.

    Every rank appends the rows of its batches to a shard, a file of JSON lines. At the end rank 0 reads the
    shards in the order of the rows' `index` and hands them on to `write`, each index once: a distributed
    sampler that repeats samples to even out its ranks leaves no trace. Several data loaders come one after
    the other.

    While a writer is attached, `trainer.predict` returns nothing: its memory would grow.

    A subclass says what the rows of a batch are, and how the merged rows are written.
    """

    def __init__(self) -> None:
        self._shard: TextIO | None = None

    @abstractmethod
    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterable[dict[str, Any]]:
        """One JSON-able row an image of the batch, each with its `index`, an int: the position in the data
        set.
        """

    @abstractmethod
    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Write the rows of all ranks, in order; called on rank 0."""

    def shards(self, trainer: Trainer) -> Path:
        """Directory of the unmerged parts; it is gone after the merge."""
        return run_directory(trainer) / f".{type(self).__name__}-shards"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with an empty shard on each rank."""
        trainer.predict_loop.return_predictions = False
        directory = self.shards(trainer)
        if trainer.is_global_zero:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        trainer.strategy.barrier("PredictionWriter.start")
        directory.mkdir(parents=True, exist_ok=True)  # on a node that does not share rank 0's disk
        self._shard = _shard_file(directory, trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the batch's rows."""
        assert self._shard is not None
        for row in self.rows(trainer, pl_module, outputs, batch):
            self._shard.write(json.dumps({"loader": dataloader_idx, **row}) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge.

        Raises:
            FileNotFoundError: rank 0 does not see the shard of another rank.
        """
        self._close()
        trainer.strategy.barrier("PredictionWriter.end")
        if trainer.is_global_zero:
            directory = self.shards(trainer)
            files = [_shard_file(directory, rank) for rank in range(trainer.world_size)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"The predictions of other ranks are missing in {directory}: {', '.join(missing)}. "
                    "trainer.default_root_dir must be a directory that all nodes share."
                )
            with contextlib.closing(merged(files)) as rows:
                self.write(trainer, pl_module, rows)
            shutil.rmtree(directory)
        trainer.strategy.barrier("PredictionWriter.merged")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the shard; it stays where it is."""
        self._close()

    def _close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def _shard_file(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank:05d}.jsonl"


def merged(files: Sequence[Path]) -> Generator[dict[str, Any], None, None]:
    """Rows of shards of JSON lines by (`loader`, `index`), the first of each; about 50 bytes a row."""
    loaders, indices, shards, offsets = (array("q") for _ in range(4))
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(file.open("rb")) for file in files]
        for shard, stream in enumerate(streams):
            offset = 0
            for line in stream:
                row = json.loads(line)
                for column, value in (
                    (loaders, row["loader"]),
                    (indices, row["index"]),
                    (shards, shard),
                    (offsets, offset),
                ):
                    column.append(value)
                offset += len(line)
        last = None
        for place in np.lexsort((indices, loaders)):  # stable: equal keys stay as they came
            key = (loaders[place], indices[place])
            if key != last:
                stream = streams[shards[place]]
                stream.seek(offsets[place])
                yield json.loads(stream.readline())
            last = key
