import random
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset, IterableDataset, default_collate

from datamodules.loading import (
    EpochSampler,
    ResumableLoader,
    SeededDataset,
    collate_images,
    hash_seed,
    kept_generators,
    seed_generators,
)
from datamodules.reading import DataError


class Numbers(Dataset):
    """Sample i is i; counts what was read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        self.reads.append(index)
        return {"index": index}


def noisy(sample: dict) -> dict:
    return {**sample, "python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(()).item()}  # noqa: NPY002


def keys(**options) -> list[tuple[int, ...]]:
    sampler = EpochSampler(range(options.pop("length", 10)), **options)
    sampler.set_epoch(options.get("epoch", 0))
    return list(sampler)


def indices(sampler: EpochSampler) -> list[int]:
    return [key[1] for key in sampler]


def loader(length: int = 22, batch_size: int = 4, **options) -> ResumableLoader:
    dataset = SeededDataset(Numbers(length), 5, noisy)
    return ResumableLoader(dataset, batch_size=batch_size, sampler=EpochSampler(dataset, seed=5), **options)


def batches(resumable: ResumableLoader, epoch: int) -> list[list[int]]:
    resumable.sampler.set_epoch(epoch)
    return [batch["index"].tolist() for batch in resumable]


# seeds


def test_hash_seed_is_stable_and_spreads():
    assert hash_seed(1, 2, 3) == 3034334815109854690
    seeds = {hash_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(50)}
    assert len(seeds) == 1250
    assert hash_seed(1, 23) != hash_seed(12, 3)


def test_kept_generators_restores_all_three():
    seed_generators(3)
    expected = noisy({})
    seed_generators(3)
    with kept_generators():
        seed_generators(99)
        noisy({})
    assert noisy({}) == expected


# the sampler


def test_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(range(50), seed=1)
    first = indices(sampler)
    assert sorted(first) == list(range(50))
    sampler.set_epoch(1)
    second = indices(sampler)
    assert second != first
    assert sorted(second) == list(range(50))
    again = EpochSampler(range(50), seed=1)
    assert indices(again) == first == indices(again)
    assert indices(EpochSampler(range(50), seed=2)) != first


def test_keys_hold_the_epoch():
    sampler = EpochSampler(range(3), shuffle=False)
    sampler.set_epoch(7)
    assert list(sampler) == [(7, 0), (7, 1), (7, 2)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_see_the_global_batches_of_one_process(world):
    per_rank = 2
    single = list(EpochSampler(range(24), seed=4))
    ranks = [list(EpochSampler(range(24), seed=4, rank=r, num_replicas=world)) for r in range(world)]
    for step in range(24 // (per_rank * world)):
        part = slice(step * per_rank, (step + 1) * per_rank)
        together = [key for rank in ranks for key in rank[part]]
        assert sorted(together) == sorted(single[step * per_rank * world : (step + 1) * per_rank * world])


@pytest.mark.parametrize(
    ("tail", "counts"), [("repeat", [4, 4, 4]), ("drop", [3, 3, 3]), ("keep", [4, 3, 3])], ids=str
)
def test_tails(tail, counts):
    ranks = [EpochSampler(range(10), tail=tail, rank=r, num_replicas=3) for r in range(3)]
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks] == counts
    seen = Counter(index for rank in ranks for index in indices(rank))
    assert max(seen.values()) == (2 if tail == "repeat" else 1)
    assert len(seen) == (9 if tail == "drop" else 10)


def test_more_ranks_than_samples():
    ranks = [indices(EpochSampler(range(2), rank=r, num_replicas=5, shuffle=False)) for r in range(5)]
    assert ranks == [[0], [1], [0], [1], [0]]
    assert indices(EpochSampler(range(2), rank=3, num_replicas=5, tail="keep")) == []


def test_repeats_follow_each_other_and_keep_the_length():
    repeated = list(EpochSampler(range(10), seed=1, repeats=3))
    assert len(repeated) == 10
    order = indices(EpochSampler(range(10), seed=1))
    assert [key[1] for key in repeated] == [index for index in order for _ in range(3)][:10]
    assert [key[2] for key in repeated] == [0, 1, 2] * 3 + [0]


def test_copies_of_a_sample_go_to_different_ranks():
    ranks = [list(EpochSampler(range(9), seed=1, repeats=3, rank=r, num_replicas=3)) for r in range(3)]
    assert len({key[1] for key in ranks[0]}) == 3
    assert [key[1] for key in ranks[0]] == [key[1] for key in ranks[2]]
    assert {key[2] for key in ranks[1]} == {1}


def test_start_at_holds_for_one_iteration():
    sampler = EpochSampler(range(10), seed=1, rank=1, num_replicas=2)
    whole = list(sampler)
    sampler.start_at(3)
    assert len(sampler) == 5
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole
    sampler.start_at(5)
    assert list(sampler) == []


@pytest.mark.parametrize("options", [{"repeats": 0}, {"rank": 2, "num_replicas": 2}], ids=str)
def test_sampler_refuses(options):
    with pytest.raises(ValueError):
        EpochSampler(range(4), **options)


# the data set


def test_sample_is_a_function_of_seed_epoch_and_index():
    dataset = SeededDataset(Numbers(10), 5, noisy)
    sample = dataset[2, 7]
    seed_generators(1)
    assert dataset.__getitems__([(2, 1), (2, 7), (0, 7)])[1] == sample
    others = [dataset[1, 7], dataset[2, 6], SeededDataset(Numbers(10), 6, noisy)[2, 7], dataset[2, 7, 1]]
    for key in ("python", "numpy", "torch"):
        assert len({value[key] for value in [*others, sample]}) == 5


def test_reading_leaves_the_generators_alone():
    seed_generators(1)
    expected = noisy({})
    seed_generators(1)
    SeededDataset(Numbers(10), 5, noisy).__getitems__([(0, 1), (0, 2)])
    assert noisy({}) == expected


def test_without_a_seed_nothing_is_seeded():
    dataset = SeededDataset(Numbers(10), None, noisy)
    assert dataset[0, 1] != dataset[0, 1]


def test_plain_index_is_that_of_epoch_zero():
    dataset = SeededDataset(Numbers(10), 5, noisy)
    assert dataset[3] == dataset[0, 3]


# the loader


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(workers):
    def whole(**options):
        return [{key: value.tolist() for key, value in batch.items()} for batch in loader(**options)]

    assert whole(num_workers=workers) == whole()


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}], ids=str
)
@pytest.mark.parametrize("done", [0, 1, 3, 5, 6])
def test_resumes_with_the_next_batch(options, done):
    first = loader(**options)
    whole = batches(first, 2)
    iterator = iter(first)
    for _ in range(done):
        next(iterator)
    state = first.state_dict()
    samples = min(4 * done, 22) if done else 22
    assert state == {"epoch": 2, "samples": samples, "batch_size": 4, "ranks": 1}

    second = loader(**options)
    second.load_state_dict({**state, "samples": 4 * done})
    assert second.state_dict() == {**state, "samples": min(4 * done, 22)}
    assert len(second) == 6
    assert [batch["index"].tolist() for batch in second] == whole[done:]
    assert batches(second, 2) == whole
    assert batches(second, 3) == batches(loader(), 3)


def resumed(done: int, batch_size: int, ranks: int, then: int, others: int, length: int = 32, **options):
    """Batches of an epoch on all ranks, ``done`` of them before an interruption, then with other sizes."""

    def loaders(batch_size: int, ranks: int) -> list[ResumableLoader]:
        dataset = SeededDataset(Numbers(length), 5, noisy)
        samplers = [EpochSampler(dataset, seed=5, rank=r, num_replicas=ranks) for r in range(ranks)]
        return [
            ResumableLoader(dataset, batch_size=batch_size, sampler=sampler, **options)
            for sampler in samplers
        ]

    before, states = [], []
    for first in loaders(batch_size, ranks):
        first.sampler.set_epoch(1)
        iterator = iter(first)
        before.append([next(iterator)["index"].tolist() for _ in range(done)])
        states.append(first.state_dict())
    assert all(state == states[0] for state in states)
    after = []
    for second in loaders(then, others):
        second.load_state_dict(states[0])
        assert second.state_dict()["samples"] == done * batch_size * ranks
        after.append(batches(second, 1))
    return before, after


@pytest.mark.parametrize(
    ("done", "batch_size", "ranks", "then", "others", "sizes"),
    [
        (2, 8, 1, 4, 1, [4, 4, 4, 4]),
        (2, 8, 1, 16, 1, [16]),
        (3, 8, 1, 16, 1, [8]),  # what is left of the second batch of 16
        (1, 8, 1, 3, 1, [1, 3, 3, 3, 3, 3, 3, 3, 2]),
        (1, 8, 2, 8, 1, [8, 8]),
        (2, 8, 1, 8, 2, [8]),
        (3, 4, 2, 8, 2, [4]),
        (1, 8, 1, 4, 3, [1, 4, 3]),  # 4 samples are left of 12, for three ranks: 1, 1 and 2
        (0, 8, 1, 4, 2, [4, 4, 4, 4]),
    ],
)
def test_each_sample_comes_once_with_other_batches_or_ranks(done, batch_size, ranks, then, others, sizes):
    before, after = resumed(done, batch_size, ranks, then, others)
    indices = Counter(index for part in (before, after) for rank in part for batch in rank for index in batch)
    assert set(indices) == set(range(32))
    extra = -32 % others  # ranks are filled up with repeated samples
    assert sum(indices.values()) == 32 + extra
    assert max(indices.values()) == 1 + bool(extra)
    assert [len(batch) for batch in min(after, key=lambda rank: len(rank[0]))] == sizes
    assert len({len(rank) for rank in after}) == 1


def test_the_rest_of_a_batch_is_transformed_as_ever():
    """Seeds go by epoch and sample, whoever reads it."""
    dataset = SeededDataset(Numbers(32), 5, noisy)
    first, second = (
        ResumableLoader(dataset, batch_size=16, sampler=EpochSampler(dataset, seed=5), num_workers=workers)
        for workers in (0, 1)
    )
    second.load_state_dict({"epoch": 0, "samples": 24, "batch_size": 8, "ranks": 1})
    (rest,) = list(second)
    whole = list(first)[1]
    assert torch.equal(rest["torch"], whole["torch"][8:])
    assert torch.equal(rest["index"], whole["index"][8:])


def test_a_broken_step_on_the_rest_of_a_batch_repeats_only_that():
    dataset = SeededDataset(Numbers(32), 5, noisy)
    resumable = ResumableLoader(dataset, batch_size=16, sampler=EpochSampler(dataset, seed=5))
    resumable.load_state_dict({"epoch": 0, "samples": 24, "batch_size": 8, "ranks": 1})
    assert resumable.state_dict()["samples"] == 24
    next(iter(resumable))
    assert resumable.state_dict()["samples"] == 32
    assert resumable.samples_after(1) == 24


def test_a_rest_that_does_not_reach_all_ranks_is_refused_with_both_values():
    with pytest.raises(
        MisconfigurationException, match=r"after 9 samples.*batch_size 3 on 1 .*batch_size 5 on 2"
    ):
        resumed(3, 3, 1, 5, 2)


def test_an_epoch_that_has_no_whole_batch_left_is_over():
    for drop_last, rest in ((True, []), (False, [2])):
        resumable = loader(30, 16, drop_last=drop_last)
        resumable.load_state_dict({"epoch": 0, "samples": 28, "batch_size": 4, "ranks": 1})
        assert [len(batch["index"]) for batch in resumable] == rest


def test_skipped_batches_are_not_read():
    resumable = loader()
    resumable.load_state_dict({"epoch": 0, "batches": 5})
    list(resumable)
    assert len(resumable.dataset.dataset.reads) == 2


def test_state_of_another_epoch_is_forgotten():
    resumable = loader()
    resumable.load_state_dict({"epoch": 0, "batches": 4})
    assert batches(resumable, 1) == batches(loader(), 1)


def test_iter_waits_for_the_epoch():
    """Lightning calls iter before set_epoch on a resumed run; workers must not prefetch the wrong epoch."""
    for workers in (0, 2):
        resumable = loader(num_workers=workers)
        iterator = iter(resumable)
        resumable.sampler.set_epoch(3)
        assert [batch["index"].tolist() for batch in iterator] == batches(loader(), 3)


def test_persistent_workers_survive_an_abandoned_epoch():
    resumable = loader(num_workers=2, persistent_workers=True)
    next(iter(resumable))
    assert batches(resumable, 1) == batches(loader(), 1)


def test_sampler_that_cannot_skip():
    resumable = ResumableLoader(SeededDataset(Numbers(10), 5), batch_size=2, shuffle=False)
    resumable.load_state_dict({"epoch": 0, "batches": 3})
    assert [batch["index"].tolist() for batch in resumable] == [[6, 7], [8, 9]]
    resumable.load_state_dict({"epoch": 0, "batches": 5})
    assert len(list(resumable)) == 5  # it knows no epochs: the next one begins


def test_stream_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(7))

    resumable = ResumableLoader(Stream(), batch_size=2)
    resumable.load_state_dict({"epoch": 0, "batches": 2})
    assert [batch.tolist() for batch in resumable] == [[4, 5], [6]]
    assert resumable.state_dict()["samples"] == 8


def test_does_not_draw_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("taken", [6, 2])
def test_epoch_end_is_called(taken):
    calls = []
    iterator = iter(loader(epoch_end=lambda: calls.append(1)))
    for _ in range(taken):
        next(iterator)
    assert bool(calls) == (taken == 6)
    iterator.close()
    assert calls


def test_collate_images():
    samples = [
        {"image": torch.full((3, 2, 2), value, dtype=torch.uint8), "label": value} for value in (0, 51, 255)
    ]
    batch = collate_images(samples)
    assert batch["image"].dtype == torch.float32
    assert batch["image"][:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert batch["label"].dtype == torch.int64
    assert default_collate(samples)["image"].dtype == torch.uint8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_of_different_sizes_in_a_batch_are_a_sentence_with_both(num_workers):
    samples = [{"image": torch.zeros(3, 48, side, dtype=torch.uint8)} for side in (64, 32)]
    loader = ResumableLoader(samples, batch_size=2, collate_fn=collate_images, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^the images .* such as 48 x 32 and 48 x 64 \(height x width\)"):
        list(loader)
