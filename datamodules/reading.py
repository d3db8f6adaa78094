"""Reading images from disk, and what happens to those that cannot be read."""

import logging
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
"""What to do with a sample that cannot be read: stop the run, or take the next readable one in its place."""

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


class CorruptSampleError(RuntimeError):
    """A file that cannot be read; the message names it and the reason."""


def read_image(path: Path | str) -> Image.Image:
    """Decodes an image file into RGB.

    Raises:
        CorruptSampleError: whatever is wrong with the file; the message holds path and reason.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        reason = f"{type(error).__name__}: {error}"
        raise CorruptSampleError(f"cannot read the image {path} ({reason})") from error


class SkipCounter:
    """Counts over the processes of a loader: each worker writes its own place in shared memory.

    Args:
        num_workers: of the loader.
    """

    def __init__(self, num_workers: int) -> None:
        self._counts = torch.zeros(max(num_workers, 1), dtype=torch.int64).share_memory_()
        self._reported = 0

    def add(self) -> None:
        """Counts one, in whichever process."""
        worker = get_worker_info()
        self._counts[0 if worker is None else worker.id] += 1

    @property
    def total(self) -> int:
        """How many were counted so far."""
        return int(self._counts.sum())

    def report(self, name: str) -> None:
        """Logs how many were counted since the last report; says nothing when none were."""
        new, self._reported = self.total - self._reported, self.total
        if new:
            log.warning("%s: %d unreadable samples were replaced by others (on_error: skip).", name, new)


class SkippingDataset(Dataset[Any]):
    """Takes the next readable sample in place of one that is not: always the same one.

    Each file that is skipped is named once in the log of the process that met it.

    Args:
        dataset: raises ``CorruptSampleError`` for what it cannot read.
        counter: counts the samples that were replaced.
    """

    def __init__(self, dataset: Dataset[Any], counter: SkipCounter) -> None:
        self.dataset = dataset
        self.counter = counter
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        for candidate in chain(range(index, len(self)), range(index)):
            try:
                return self.dataset[candidate]
            except CorruptSampleError as error:
                if candidate == index:
                    self.counter.add()
                if candidate not in self._named:
                    self._named.add(candidate)
                    log.warning("skipped: %s", error)
        raise CorruptSampleError(f"not one of the {len(self)} samples can be read.")
