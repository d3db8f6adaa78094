"""The cache: what it holds, when it is computed again, what it refuses; and batches read from it."""

import json

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules.fake_images.transforms import FakeImageTransforms
from datamodules.features import FeatureCache, FeatureDataset, FeatureStore, shard_file
from datamodules.reading import CorruptSampleError


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


def opened(files, encoder, described="plain", shard_rows=3, cache="cache", **options):
    root, names = files
    made = FeatureCache(
        root / cache, encoder, batch_size=2, shard_rows=shard_rows, on_error=options.pop("on_error", "raise")
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
    with pytest.raises(MisconfigurationException, match="width 3, and 4"):
        FeatureStore(store.folder, {"width": 4})


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
