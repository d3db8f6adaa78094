"""Tar shards: samples by index, the order of an epoch, and damaged files."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.loading import ResumableLoader, SeededDataset
from datamodules.reading import CorruptSampleError, DataError
from datamodules.streaming import ShardSampler, TarShards
from tests.fuzzing import fuzz, outcome

MEMBERS = {"image": ("jpg", "png"), "caption": ("txt",)}


def write(path: Path, names: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Ten samples in three shards of 5, 1 and 4."""
    files, number = [], 0
    for shard, count in enumerate((5, 1, 4)):
        names = {}
        for _ in range(count):
            names[f"deep/{number:03d}.PNG" if number % 2 else f"{number:03d}.jpg"] = bytes([number]) * 9
            names[f"deep/{number:03d}.txt" if number % 2 else f"{number:03d}.txt"] = f"text {number}".encode()
            number += 1
        names |= {f"{shard}.json": b"{}", f"._{shard}.jpg": b"x", f"lonely{shard}.txt": b"no picture"}
        files.append(write(tmp_path / f"{shard:05d}.tar", names))
    return files


def test_samples_by_index(shards, caplog):
    data = TarShards(shards, MEMBERS)
    assert (len(data), data.lengths, data.incomplete) == (10, [5, 1, 4], 3)
    assert "3 samples that lack a member" in caplog.text
    assert data[7] == {
        "key": "deep/007",
        "path": str(shards[2]),
        "index": 7,
        "image": b"\7" * 9,
        "caption": b"text 7",
    }
    assert [data[index]["caption"].decode() for index in range(10)] == [f"text {n}" for n in range(10)]


def test_an_epoch_goes_through_a_few_shards_at_a_time():
    lengths = [30, 10, 20, 25, 15]
    sampler = ShardSampler(lengths, window=2, seed=1)
    rows = np.array([key[1] for key in sampler])
    assert sorted(rows) == list(range(100))
    numbers = np.repeat(np.arange(5), lengths)[rows]
    windows = [list(dict.fromkeys(numbers.tolist()))[place : place + 2] for place in (0, 2, 4)]
    ends = np.cumsum([sum(lengths[shard] for shard in window) for window in windows])
    for window, part in zip(windows, np.split(numbers, ends[:-1]), strict=True):
        assert set(part.tolist()) == set(window)
    assert (np.diff(numbers) != 0).sum() > 20, "shards of a window are mixed"
    sampler.set_epoch(1)
    assert [key[1] for key in sampler] != rows.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_get_equally_many_and_workers_change_nothing(shards, world):
    def batches(rank, workers, start=0):
        data = SeededDataset(TarShards(shards, MEMBERS), seed=3)
        sampler = ShardSampler(data.dataset.lengths, 2, seed=3, tail="drop", rank=rank, num_replicas=world)
        loader = ResumableLoader(data, sampler=sampler, batch_size=2, num_workers=workers)
        if start:
            first = iter(loader)
            for _ in range(start):
                next(first)
            state = loader.state_dict()
            loader = ResumableLoader(data, sampler=sampler, batch_size=2)
            loader.load_state_dict(state)
        return [batch["caption"] for batch in loader]

    whole = [batches(rank, 0) for rank in range(world)]
    assert len({sum(map(len, part)) for part in whole}) == 1
    seen = [caption for part in whole for batch in part for caption in batch]
    assert len(seen) == len(set(seen)) == 10 // world * world
    if world == 2:
        assert batches(1, 1) == whole[1]
    assert batches(0, 0, start=1) == whole[0][1:]


def test_what_cannot_be_read_is_named(shards, tmp_path):
    data = TarShards(shards, MEMBERS)
    shards[0].write_bytes(shards[0].read_bytes()[:600])
    with pytest.raises(CorruptSampleError, match=r"cannot read .* of .*00000\.tar: .* shorter"):
        [data[index] for index in range(5)]
    shards[1].unlink()
    with pytest.raises(CorruptSampleError, match=r"00001\.tar"):
        data[5]
    with pytest.raises(DataError, match=r"gz\.tar is no uncompressed tar"):
        TarShards([write(tmp_path / "gz.tar", {"a.jpg": b"x"}, "w:gz")], MEMBERS)
    with pytest.raises(DataError, match="no tar has samples with image, caption"):
        TarShards([write(tmp_path / "empty.tar", {"a.jpg": b"x"})], MEMBERS)
    with pytest.raises(ValueError, match="window"):
        ShardSampler([1], 0)


@fuzz(60)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10239), st.integers(0, 255)), max_size=5),
    cut=st.none() | st.integers(0, 10240),
)
def test_mutated_tars_are_read_or_refused(shards, tmp_path, edits, cut):
    content = bytearray(shards[0].read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    path = tmp_path / "mutated.tar"
    path.write_bytes(content[:cut])
    result = outcome(lambda: list(map(TarShards([path], MEMBERS).__getitem__, range(1))), path)
    assert not result.read or len(result.value[0]) == 5
