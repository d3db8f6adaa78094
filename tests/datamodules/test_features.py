"""The cache: what it holds, when it is computed again, what it refuses; and batches read from it."""

import json
import logging
import os
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules.fake_images.transforms import FakeImageTransforms
from datamodules.features import FeatureCache, FeatureDataset, FeatureStore
from datamodules.reading import CorruptSampleError, DataError
from datamodules.shards import STALE_SECONDS, shard_file
from tests.fuzzing import fuzz, outcome


class Means:
    """An encoder of each channel's mean, which counts its images."""

    width, model = 3, "means/of channels"

    def __init__(self, key="means"):
        self.key, self.images = key, 0

    def to(self, device):
        return self

    def __call__(self, images):
        self.images += len(images)
        return images.mean(dim=(2, 3))


@pytest.fixture
def files(tmp_path):
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        Image.new("RGB", (12, 10), (30 * number, 5, 200)).save(tmp_path / name)
    return tmp_path, names


TRANSFORMS = FakeImageTransforms(image_size=8)


def opened(files, encoder, described="plain", shard_bytes=36, cache="cache", **options):
    root, names = files
    made = FeatureCache(
        root / cache,
        encoder,
        batch_size=2,
        shard_bytes=shard_bytes,
        **{name: options.pop(name) for name in ("on_error", "shape", "dtype") if name in options},
    )
    transform = options.pop("transform", TRANSFORMS.evaluation())
    return made.open("part", root, names, transform, described, **options)


def everything(store):
    rows = np.arange(len(store))
    return store.read(rows, np.zeros_like(rows))


def test_features_are_those_of_the_images_and_computed_once(files):
    encoder = Means()
    store = opened(files, encoder)
    expected = [[30 * number / 255, 5 / 255, 200 / 255] for number in range(7)]
    np.testing.assert_allclose(everything(store), expected, rtol=1e-6)
    assert (encoder.images, len(store), store.width, store.views) == (7, 7, 3, 1)
    assert len(list(store.folder.glob("shard_*.npy"))) == 3
    assert isinstance(np.load(shard_file(store.folder, 0), mmap_mode="r"), np.memmap)
    opened(files, encoder)
    assert encoder.images == 7


def test_rows_are_read_in_any_order(files):
    store = opened(files, Means())
    rows = np.array([6, 0, 3, 3, 5])
    np.testing.assert_array_equal(store.read(rows, np.zeros(5, np.int64)), everything(store)[rows])


def test_another_encoder_transform_or_list_is_another_cache(files):
    encoder = Means()
    opened(files, encoder)
    opened(files, encoder, "other")
    opened((files[0], files[1][:5]), encoder)
    assert encoder.images == 7 + 7 + 5
    other = Means("other")
    opened(files, other)
    assert other.images == 7
    Image.new("RGB", (30, 30)).save(files[0] / "3.png")  # another size in bytes
    opened(files, encoder)
    assert encoder.images == 26


def test_an_interrupted_extraction_goes_on_where_it_was(files):
    encoder = Means()
    store = opened(files, encoder)
    before = everything(store)
    (store.folder / "header.json").unlink()
    shard_file(store.folder, 1).unlink()
    again = opened(files, encoder)
    assert encoder.images == 7 + 3
    np.testing.assert_array_equal(everything(again), before)


def test_a_header_that_says_otherwise_is_refused(files):
    store = opened(files, Means())
    header = json.loads((store.folder / "header.json").read_text())
    (store.folder / "header.json").write_text(json.dumps({**header, "encoder": "someone else's"}))
    with pytest.raises(
        MisconfigurationException, match=r"encoder \"someone else's\", and 'means' is asked for"
    ):
        opened(files, Means())
    with pytest.raises(MisconfigurationException, match=r"shape \[3\], and \[4\]"):
        FeatureStore(store.folder, {"shape": [4]})


def test_views_are_drawn_once_and_differ(files):
    transform = FakeImageTransforms(image_size=8, train_resize=None, blur_probability=1.0, hflip=0).train()
    for number, name in enumerate(files[1]):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(files[0] / name)
    store = opened(files, Means(), transform=transform, views=3, seed=1)
    assert store.views == 3
    rows = np.zeros(3, np.int64)
    views = store.read(rows, np.arange(3))
    assert len(np.unique(views[:, 0])) == 3
    again = opened(files, Means(), transform=transform, views=3, seed=1, cache="other")
    np.testing.assert_array_equal(again.read(rows, np.arange(3)), views)


def test_unreadable_images(files):
    (files[0] / "4.png").write_bytes(b"no image")
    with pytest.raises(CorruptSampleError, match=r"4\.png"):
        opened(files, Means())
    store = opened(files, Means(), on_error="skip")
    assert store.dropped == [4]
    dataset = FeatureDataset([store], [1], [0])
    assert len(dataset) == 6
    batch = dataset.__getitems__([0, 4, 5])
    np.testing.assert_allclose(batch["features"][:, 0] * 255, [0, 150, 180], rtol=1e-5)


def test_features_must_be_finite(files):
    encoder = Means()
    encoder.__class__ = type(
        "Broken", (Means,), {"__call__": lambda self, images: images.mean(dim=(2, 3)) / 0}
    )
    with pytest.raises(ValueError, match=r"features of .*0\.png are not finite"):
        opened(files, encoder)


def test_batches_and_their_labels(files):
    store = opened(files, Means())
    dataset = FeatureDataset([store, store], [0, 1], [4, 4])
    assert len(dataset) == 14
    fakes = dataset.of((1,))
    batch = fakes.__getitems__([(2, 0), (2, 6)])
    assert batch["label"].tolist() == [1, 1]
    assert batch["index"].tolist() == [7, 13]
    assert batch["generator"].tolist() == [4, 4]
    np.testing.assert_array_equal(batch["features"], everything(store)[[0, 6]])
    assert dataset[3]["index"] == 3


def test_the_view_of_a_row_is_a_function_of_seed_epoch_and_row(files):
    transform = FakeImageTransforms(image_size=8, train_resize=None).train()
    store = opened(files, Means(), transform=transform, views=4, seed=1)
    dataset = FeatureDataset([store], [0], [0], seed=5)

    def views(epoch, order=range(7)):
        return dataset._views(np.array(list(order)), epoch, 4)

    assert np.array_equal(views(0), views(0))
    assert np.array_equal(views(0, reversed(range(7)))[::-1], views(0)), "whatever the batch"
    assert len({tuple(views(epoch)) for epoch in range(5)}) > 3


def test_statistics(files):
    store = opened(files, Means())
    mean, std = FeatureDataset([store, store], [0, 1], [0, 0]).statistics(0)
    values = torch.from_numpy(everything(store))
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(std, values.std(0, unbiased=False), atol=1e-5, rtol=1e-4)


class Maps(Means):
    """An encoder of maps: the image itself, halved."""

    model = "maps"

    def __call__(self, images):
        self.images += len(images)
        return torch.nn.functional.avg_pool2d(images, 2)


def test_maps_of_any_dtype_in_shards_of_so_many_bytes(files):
    encoder = Maps()
    row = 3 * 4 * 4 * 2  # bytes
    store = opened(files, encoder, shape=(3, 4, 4), dtype="float16", shard_bytes=2 * row + 1)
    assert (store.shape, store.dtype, encoder.images) == ((3, 4, 4), np.float16, 7)
    sizes = [np.load(path).nbytes for path in sorted(store.folder.glob("shard_*.npy"))]
    assert sizes == [2 * row, 2 * row, 2 * row, row]
    maps = everything(store)
    assert maps.dtype == np.float16
    np.testing.assert_allclose(maps[:, 0, 1, 2] * 255, np.arange(7) * 30, atol=0.2)
    same = opened(files, encoder, shape=(3, 4, 4), dtype="float16", shard_bytes=10**6)
    assert encoder.images == 7, "what is there is read whatever the size of new shards"
    np.testing.assert_array_equal(everything(same), maps)
    opened(files, encoder, shape=(3, 4, 4))
    assert encoder.images == 14, "another dtype is another cache"
    with pytest.raises(
        MisconfigurationException, match=r"gives features of shape \(3, 4, 4\), and \(3, 5, 5\)"
    ):
        opened(files, encoder, shape=(3, 5, 5))


def test_an_image_larger_than_a_shard_has_one_of_its_own(files):
    assert len(list(opened(files, Means(), shard_bytes=1).folder.glob("shard_*.npy"))) == 7


def test_what_does_not_fit_the_dtype_is_named(files):
    encoder = Means()
    encoder.__class__ = type("Large", (Means,), {"__call__": lambda self, images: images.mean((2, 3)) + 7e4})
    with pytest.raises(DataError, match=r"0\.png are not finite, in float16"):
        opened(files, encoder, dtype="float16")


def damage(path, kind):
    content = path.read_bytes()
    if kind == "flipped":
        place = len(content) - 6
        content = content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(kind, content))


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped"])
@pytest.mark.parametrize("name", ["shard_00000.npy", "shard_00001.npy", "shard_00000.json", "header.json"])
def test_what_is_damaged_is_made_again(files, caplog, name, kind):
    encoder = Means()
    store = opened(files, encoder)
    before = everything(store)
    damage(store.folder / name, kind)
    again = opened(files, encoder)
    np.testing.assert_array_equal(everything(again), before)
    made = 0 if name == "header.json" else 3
    assert encoder.images == 7 + made
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert "is damaged, or of an older version: it is made again" in said[0]
    opened(files, encoder)
    assert encoder.images == 7 + made


def test_a_cache_of_an_older_version_is_made_again(files):
    """Its header had other entries, and beside a shard lay a list."""
    encoder = Means()
    store = opened(files, encoder)
    header = json.loads((store.folder / "header.json").read_text())
    for entry in ("shape", "dtype"):
        del header[entry]
    (store.folder / "header.json").write_text(json.dumps({**header, "width": 3}))
    for number in range(3):
        shard_file(store.folder, number).with_suffix(".json").write_text("[]")
    assert everything(opened(files, encoder)).shape == (7, 3)
    assert encoder.images == 14


def test_leftovers_of_killed_runs_are_removed(files):
    store = opened(files, Means())
    old, new = (store.folder / f".shard_00000.npy-{number}" for number in (1, 2))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - STALE_SECONDS - 1,) * 2)
    opened(files, Means())
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("left", [(), (1,), (0, 2)])
def test_ranks_share_the_shards_whatever_is_there_already(files, monkeypatch, left):
    """One rank after the other: a rank that comes late sees what the first has made since."""
    whole = opened(files, Means(), cache="whole")
    store = opened(files, Means(), cache="part")
    (store.folder / "header.json").unlink()
    for number in {0, 1, 2} - set(left):
        shard_file(store.folder, number).unlink()
    monkeypatch.setattr("datamodules.features.distributed.barrier", lambda: None)
    encoders = {}
    for rank in (1, 0):
        monkeypatch.setattr("datamodules.features.default_ranks", lambda rank=rank: (rank, 2))
        encoders[rank] = Means()
        if rank:  # rank 0 writes the header, so that this one cannot open what it has made
            with pytest.raises(DataError, match="no header"):
                opened(files, encoders[rank], cache="part")
        else:
            np.testing.assert_array_equal(
                everything(opened(files, encoders[rank], cache="part")), everything(whole)
            )
    rows = {0: 3, 1: 3, 2: 1}
    assert encoders[1].images == sum(rows[number] for number in {1} - set(left))
    assert encoders[0].images == sum(rows[number] for number in {0, 2} - set(left))


def test_any_data_set_can_be_cached(tmp_path):
    pictures = [np.full((4, 4, 3), 10 * number, np.uint8) for number in range(5)]
    cache = FeatureCache(tmp_path, Means())
    store = cache.open_dataset(
        "arrays", pictures, "five", lambda a: torch.from_numpy(a).permute(2, 0, 1), "-"
    )
    np.testing.assert_allclose(everything(store)[:, 0] * 255, np.arange(5) * 10, rtol=1e-5)


@fuzz(60)
@given(
    name=st.sampled_from(["shard_00000.npy", "shard_00001.npy", "shard_00002.json", "header.json"]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.floats(0, 1),
)
def test_mutated_caches_are_read_or_made_again(files, name, edits, cut):
    """Or refused, where the header has become another encoder's."""
    first = opened(files, Means())
    expected, folder = everything(first), first.folder
    content = bytearray((folder / name).read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    (folder / name).write_bytes(content if cut is None else content[: int(cut * len(content))])
    result = outcome(lambda: everything(opened(files, Means())), folder)
    if result.read:
        np.testing.assert_array_equal(result.value, expected)
    else:
        assert name == "header.json"
    shutil.rmtree(folder)
