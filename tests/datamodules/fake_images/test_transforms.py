import random

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.fake_images.transforms import (
    Degradation,
    FakeImageTransforms,
    blurred,
    centre_crop,
    compressed,
    resized,
)


def noise(width=50, height=40):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def test_universal_tests_on_a_centre_crop_without_resizing():
    image = noise(50, 40)
    found = FakeImageTransforms(image_size=20).evaluation()(image)
    assert torch.equal(found, torch.from_numpy(np.asarray(image)[10:30, 15:35].transpose(2, 0, 1).copy()))


def test_a_smaller_image_is_padded_with_black():
    found = np.array(centre_crop(noise(10, 8), 20))
    assert found.shape == (20, 20, 3)
    assert np.array_equal(found[6:14, 5:15], np.asarray(noise(10, 8)))
    found[6:14, 5:15] = 0
    assert not found.any()


def test_resizing_takes_the_shorter_side():
    assert resized(noise(50, 40), 20).size == (25, 20)
    assert resized(noise(40, 50), 80, "bicubic").size == (80, 100)
    assert FakeImageTransforms(image_size=16, resize=16).evaluation()(noise()).shape == (3, 16, 16)


def test_blur_is_rounded_once_and_keeps_the_mean():
    image = noise()
    assert np.array_equal(np.asarray(blurred(image, 0.0)), np.asarray(image))
    strong = np.asarray(blurred(image, 3.0), np.float64)
    assert strong.std() < 0.3 * np.asarray(image).std()
    assert strong.mean() == pytest.approx(np.asarray(image).mean(), abs=1.0), "truncation would darken it"


def test_degradations():
    image = noise(64, 64)
    assert Degradation()(image) is image
    assert Degradation(low_resolution=32)(image).size == (32, 32)
    assert np.array_equal(np.asarray(Degradation(jpeg_quality=30)(image)), np.asarray(compressed(image, 30)))
    both = Degradation(low_resolution=32, blur_sigma=2.0)(image)
    assert np.array_equal(np.asarray(both), np.asarray(blurred(resized(image, 32), 2.0)))
    with pytest.raises(ValueError, match="jpeg_quality"):
        Degradation(jpeg_quality=0)


def test_training_is_random_and_repeats_with_its_seed():
    train = FakeImageTransforms(image_size=16, train_resize=24).train()

    def drawn(seed):
        random.seed(seed)
        return train(noise())

    assert torch.equal(drawn(3), drawn(3))
    assert len({drawn(seed).float().mean().item() for seed in range(8)}) == 8
    assert drawn(0).shape == (3, 16, 16)


def test_no_augmentation_is_evaluation():
    options = FakeImageTransforms(image_size=16, augmentation="none")
    assert torch.equal(options.train()(noise()), options.evaluation()(noise()))


def test_unbiasing_comes_first_for_every_image():
    options = FakeImageTransforms(image_size=16, unbias_jpeg=50, unbias_size=20)
    expected = centre_crop(compressed(resized(noise(), 20), 50), 16)
    found = options.evaluation()(noise())
    assert np.array_equal(found.numpy().transpose(1, 2, 0), np.asarray(expected))


def test_what_a_transform_depends_on_is_in_its_name():
    first = repr(FakeImageTransforms(resize=224).evaluation())
    assert first == repr(FakeImageTransforms(resize=224).evaluation())
    assert first != repr(FakeImageTransforms(resize=225).evaluation())
    assert first != repr(FakeImageTransforms(resize=224).evaluation(Degradation(blur_sigma=3)))
    assert first != repr(FakeImageTransforms(resize=224).train())


def test_bad_options():
    with pytest.raises(ValueError, match="hflip"):
        FakeImageTransforms(hflip=1.5)
    with pytest.raises(ValueError, match="image_size"):
        FakeImageTransforms(image_size=0)
