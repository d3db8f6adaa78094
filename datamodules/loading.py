"""The loader of every DataModule: reproducible from (seed, epoch, index) alone, and resumable inside an
epoch.

The order of an epoch is a function of the seed and the epoch, and the random transform of a sample is a
function of the seed, the epoch and the sample. So the workers, the ranks, an interruption and the number of
batches that were drawn before change nothing, and nothing but (epoch, samples) has to be kept in a
checkpoint: a run may go on with another batch size or number of ranks.
"""

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate, get_worker_info

from datamodules.reading import DataError
from datamodules.workers import deaf_workers

Key = int | tuple[int, ...]
"""What a sampler hands to a data set: ``index``, ``(epoch, index)`` or ``(epoch, index, repeat)``."""


def hash_seed(*numbers: int) -> int:
    """Mixes integers into 64 bits that look random: neighbouring epochs or indices get unrelated seeds."""
    message = ",".join(map(str, numbers)).encode()
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little")


def seed_generators(seed: int) -> None:
    """Seeds the generators that transforms draw from: Python's, NumPy's and torch's on the CPU.

    Unlike ``seed_everything`` it leaves the devices alone, so it is cheap enough for every sample.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (the transforms of timm draw from the global generator)
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restores the generators of ``seed_generators`` on leaving.

    Nobody else draws from the generators of a worker process, so they are left as they are there.
    """
    if get_worker_info() is not None:
        yield
        return
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.default_generator.set_state(torch_state)


def default_ranks() -> tuple[int, int]:
    """``(rank, world size)`` of torch.distributed, ``(0, 1)`` where it is not initialised."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class EpochSampler(DistributedSampler[Any]):
    """Yields the keys ``(epoch, index)`` of one rank; the order is a pure function of (seed, epoch).

    Rank r takes the positions r, r + world, r + 2 world, ... of the epoch's order. So N ranks with batches of
    B see in their k-th batches, together, what one process with batches of N*B sees in its k-th.

    Being a ``DistributedSampler`` it is kept as it is by Lightning, which calls ``set_epoch``.

    Args:
        dataset: only its length matters.
        seed: of the order.
        shuffle: a new permutation in each epoch, or the order of the data set.
        tail: what happens when the ranks do not divide the length. ``"repeat"`` fills up with the first
            samples of the epoch, ``"drop"`` leaves the last ones out (both give all ranks equally many),
            ``"keep"`` gives each sample to exactly one rank, so ranks may differ by one: for evaluation.
        repeats: repeated augmentation (Hoffer et al. 2020, as in DeiT): each sample of the permutation comes
            ``repeats`` times in a row, and the epoch keeps its length, so it sees the first 1/repeats of the
            permutation. Keys are then ``(epoch, index, repeat)``. The copies of a sample go to different
            ranks.
        rank: of this process; from torch.distributed when None.
        num_replicas: number of ranks; from torch.distributed when None.

    Raises:
        ValueError: for ``repeats`` below 1, or a rank outside 0..num_replicas-1.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        seed: int = 0,
        shuffle: bool = True,
        tail: Literal["repeat", "drop", "keep"] = "repeat",
        repeats: int = 1,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        here, world = default_ranks()
        rank, num_replicas = here if rank is None else rank, num_replicas or world
        super().__init__(
            dataset,  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=tail == "drop",
        )
        self.tail = tail
        self.repeats = repeats
        self._start = 0
        length = len(dataset)
        whole = length // num_replicas * num_replicas
        self.total_size = {
            "drop": whole,
            "keep": length,
            "repeat": -(-length // num_replicas) * num_replicas,
        }[tail]
        self.num_samples = len(range(rank, self.total_size, num_replicas))

    def start_at(self, sample: int) -> None:
        """Makes the next iteration, and only that one, begin at this rank's sample number ``sample``."""
        self._start = sample

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        start, self._start = self._start, 0
        length = len(self.dataset)  # type: ignore[arg-type]
        first = self.rank + start * self.num_replicas
        if first >= self.total_size:
            return
        positions = torch.arange(first, self.total_size, self.num_replicas) % length
        indices = self._order(length)[positions // self.repeats].tolist()
        epoch = self.epoch
        if self.repeats == 1:
            for index in indices:
                yield epoch, index
        else:
            for index, repeat in zip(indices, (positions % self.repeats).tolist(), strict=True):
                yield epoch, index, repeat

    def _order(self, length: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(length)
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
        return torch.randperm(length, generator=generator)


class SeededDataset(Dataset[Any]):
    """Reads and transforms samples so that each is a pure function of (seed, epoch, index, repeat).

    The generators of Python, NumPy and torch are seeded with a hash of the key before a sample is read, and
    restored afterwards, whichever process does it. Seeding takes about 9 us a sample; restoring, which only
    happens without workers, about 90 us a batch (measured on one core of a server).

    Args:
        dataset: of the raw samples, read by ``dataset[index]``.
        seed: enters the hash. None: nothing here is random, and no generator is touched.
        transform: from the raw sample to what the batch is made of; None leaves it as it is.
    """

    def __init__(
        self, dataset: Dataset[Any], seed: int | None = None, transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """The samples of a batch; torch's loader calls this when a data set has it."""
        if self.seed is None:
            return [self._sample(key) for key in keys]
        with kept_generators():
            return [self._seeded(self.seed, key) for key in keys]

    def _seeded(self, seed: int, key: Key) -> Any:
        seed_generators(hash_seed(seed, *((0, key) if isinstance(key, int) else key)))
        return self._sample(key)

    def _sample(self, key: Key) -> Any:
        sample = self.dataset[key if isinstance(key, int) else key[1]]
        return sample if self.transform is None else self.transform(sample)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can be saved in the middle of an epoch and goes on with the very next batch.

    Lightning keeps ``state_dict`` in its checkpoints and hands it back to ``load_state_dict`` before the
    first batch. What was handed out is then skipped in the sampler: nothing is read for it.
    ``len`` stays the length of the whole epoch, as Lightning's counters go on where they were.

    A state counts the samples of all ranks, so the loader that takes it may have another batch size or number
    of ranks. Its batches stay those of a whole epoch of its own; where the state stands within one of them,
    the first batch is what is left of that one, and is read in this process.

    A state belongs to an epoch: when the sampler has moved on to another epoch the iteration starts at its
    first batch. An epoch that was complete yields nothing more, and the next iteration is a whole one again.

    Workers start with the first batch and not with ``iter``. Lightning calls ``iter`` on a resumed run before
    it tells the sampler its epoch, and workers that prefetch at once would read the samples of epoch 0.

    Args:
        dataset: usually a ``SeededDataset``.
        epoch_end: is called when the last batch of an epoch was made, or the iteration was given up before.
        options: of ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self, dataset: Dataset[Any], *, epoch_end: Callable[[], None] | None = None, **options: Any
    ) -> None:
        if options.get("generator") is None:
            # an iterator draws a seed for its workers: not from the generator that the model draws from
            options["generator"] = torch.Generator().manual_seed(0)
        super().__init__(dataset, **options)
        self._epoch_end = epoch_end
        self._state = {"epoch": 0, "batches": 0, "seen": 0}
        self._began = 0
        self._resume: dict[str, int] | None = None

    @property
    def ranks(self) -> int:
        """Number of processes that share the epoch."""
        return int(getattr(self.sampler, "num_replicas", 0)) or default_ranks()[1]

    @property
    def global_batch(self) -> int:
        """Samples that all ranks see in one batch; batches are counted where they have no fixed size."""
        return (self.batch_size or 1) * self.ranks

    def state_dict(self) -> dict[str, int]:
        """``{"epoch": of the sampler, "samples": handed out in this epoch, on all ranks}``, and the
        ``batch_size`` and ``ranks`` that they were handed out with.
        """
        samples = self._state["batches"] * self.global_batch + self._state["seen"]
        samples = min(samples, getattr(self.sampler, "total_size", samples))  # a last batch may be short
        size = self.batch_size or 1
        return {"epoch": self._state["epoch"], "samples": samples, "batch_size": size, "ranks": self.ranks}

    def samples_after(self, batches: int) -> int:
        """How many samples are handed out after so many batches of the epoch that is under way."""
        return max(batches * self.global_batch, self._began)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration go on after ``state["samples"]`` samples if it is in ``state["epoch"]``.

        States of former versions count ``batches`` of this loader's own size.

        Raises:
            MisconfigurationException: the state stands within a batch of this loader, and what is left of
                that is too little for all ranks, or the sampler cannot skip samples.
        """
        samples = int(state["samples"]) if "samples" in state else int(state["batches"]) * self.global_batch
        batches, seen = self._position(samples, state)
        self._resume = {"epoch": int(state["epoch"]), "batches": batches, "seen": seen}
        self._state = dict(self._resume)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self._resume["epoch"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        epoch = int(getattr(self.sampler, "epoch", 0))
        start, seen = self._first_batch(epoch)
        self._state = state = {"epoch": epoch, "batches": start, "seen": seen}
        self._began = start * self.global_batch + seen
        length = sized_len(self)
        try:
            for batch in self._from(start, seen):
                state["batches"] += 1
                state["seen"] = 0
                if state["batches"] == length:
                    self._report()
                yield batch
        finally:
            self._report()

    def _position(self, samples: int, state: dict[str, int]) -> tuple[int, int]:
        """Whole batches among an epoch's first ``samples``, and how many more of them are seen."""
        batches, seen = divmod(samples, self.global_batch)
        length, total = sized_len(self), getattr(self.sampler, "total_size", None)
        if length is not None and (batches >= length or (total is not None and samples >= total)):
            return length, 0
        if not seen:
            return batches, 0
        left = self.global_batch - seen if total is None else min(self.global_batch - seen, total - samples)
        if left < self.ranks or not self._skips:
            reason = f"what is left of one is too little for {self.ranks} ranks" * (left < self.ranks)
            raise MisconfigurationException(
                f"The checkpoint was written after {samples} samples of an epoch, with batch_size "
                f"{state['batch_size']} on {state['ranks']} ranks. With batch_size {self.batch_size} on "
                f"{self.ranks} that is no whole number of batches, and "
                f"{reason or 'the sampler cannot skip samples'}: resume with a batch_size whose product with "
                f"the number of ranks divides {samples}."
            )
        return batches, seen

    @property
    def _skips(self) -> bool:
        return self.batch_size is not None and hasattr(self.sampler, "start_at")

    def _first_batch(self, epoch: int) -> tuple[int, int]:
        resume, self._resume = self._resume, None
        if resume is None or resume["epoch"] != epoch:
            return 0, 0
        length = sized_len(self)
        complete = length is not None and resume["batches"] >= length
        if complete and not hasattr(self.sampler, "epoch"):
            return 0, 0
        return resume["batches"], resume["seen"]

    def _from(self, start: int, seen: int) -> Iterator[Any]:
        if seen:
            return self._from_within(start, seen)
        if start and self._skips:
            self.sampler.start_at(start * (self.batch_size or 1))  # type: ignore[attr-defined]
            start = 0
        with deaf_workers(self):
            batches = super().__iter__()
        for _ in range(start):  # a sampler that cannot skip: read and forget
            next(batches, None)
        return batches

    def _from_within(self, start: int, seen: int) -> Iterator[Any]:
        yield self._rest_of_batch(start, seen)
        yield from self._from(start + 1, 0)  # not before it is asked for: it places the sampler

    def _rest_of_batch(self, number: int, seen: int) -> Any:
        """This rank's part of a batch of which all ranks together have ``seen`` samples already."""
        sampler: Any = self.sampler
        size = self.batch_size or 1
        first = -(-(number * self.global_batch + seen - sampler.rank) // self.ranks)
        sampler.start_at(first)
        keys = list(islice(sampler, (number + 1) * size - first))
        read = getattr(self.dataset, "__getitems__", lambda keys: [self.dataset[key] for key in keys])
        return self.collate_fn(read(keys))

    def _report(self) -> None:
        if self._epoch_end is not None:
            self._epoch_end()


def collate_images(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of samples whose "image" is uint8, (3, H, W).

    Returns:
        The default collation, but with "image" as float32 (B, 3, H, W) in [0, 1].

    Raises:
        DataError: they are of different sizes.
    """
    sizes = {tuple(sample["image"].shape[-2:]) for sample in samples}
    if len(sizes) > 1:
        some = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
        raise DataError(
            f"the images of a batch are of different sizes, such as {some} (height x width): the transform "
            "must bring them to one, or batch_size be 1."
        )
    batch = default_collate(samples)
    batch["image"] = batch["image"].float().div_(255)
    return batch


def collate_sides(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of pairs, of images or of captions without image."""
    return collate_images(samples) if "image" in samples[0] else default_collate(samples)
