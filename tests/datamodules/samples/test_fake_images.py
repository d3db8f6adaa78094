"""Six generators that differ, and files that say nothing about their label."""

import numpy as np
import pytest
from PIL import Image

from datamodules.samples.fake_images import (
    GENERATORS,
    drawn_pictures,
    photograph_crops,
    write_fake_images,
    write_generators,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fakes") / "sample"
    write_fake_images(folder, size=12, image_size=32)
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, np.float64)


def metadata(path):
    """All that a file says beside its pixels."""
    with Image.open(path) as image:
        status = path.stat()
        return (
            image.size,
            image.mode,
            image.format,
            str(image.info),
            path.suffix,
            status.st_size,
            status.st_mtime,
        )


def test_metadata_alone_are_at_chance(root):
    """The best rule on metadata is one that tells some real from some fake file: there is none."""
    found = {kind: {metadata(path) for path in root.glob(f"*/*/*/{kind}/*")} for kind in ("nature", "ai")}
    assert found["nature"] == found["ai"]
    assert len(found["ai"]) == 1
    names = {kind: {path.name for path in root.glob(f"*/*/train/{kind}/*")} for kind in ("nature", "ai")}
    assert names["nature"] == names["ai"]


def test_each_generator_leaves_a_trace_of_its_own(root):
    def difference(name):
        folder = next(root.glob(f"{name}/*/train"))
        real, fake = (
            np.stack([pixels(path) for path in sorted((folder / kind).iterdir())])
            for kind in ("nature", "ai")
        )
        assert 1 < np.abs(real - fake).mean() < 40, f"{name}: the same picture, but not the same pixels"
        spectra = [
            np.abs(np.fft.fft2(images.mean(axis=3), axes=(1, 2))).mean(axis=0) for images in (real, fake)
        ]
        return np.log((spectra[1] + 1) / (spectra[0] + 1)).flatten()

    traces = np.stack([difference(name) for name in GENERATORS])
    traces -= traces.mean(axis=1, keepdims=True)
    traces /= np.linalg.norm(traces, axis=1, keepdims=True)
    alike = traces @ traces.T - np.eye(len(traces))
    assert alike.max() < 0.98, "two generators with one spectrum"


def test_the_sample_is_deterministic_and_left_alone(root, tmp_path):
    write_fake_images(tmp_path / "again", size=12, image_size=32)
    for path in sorted(root.glob("*/*/train/ai/0000[03].png")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(root)).read_bytes()
    path.write_bytes(b"mine")
    write_fake_images(root, size=12, image_size=32)
    assert path.read_bytes() == b"mine"
    write_fake_images(tmp_path / "restored", size=12, image_size=32)
    path.write_bytes((tmp_path / "restored" / path.relative_to(root)).read_bytes())


def test_training_and_test_pictures_differ():
    train, test = drawn_pictures(4, 32, 0), drawn_pictures(4, 32, 1)
    assert np.abs(train - test).mean() > 0.05


def test_crops_of_photographs(tmp_path):
    y, x = np.mgrid[0:90, 0:120]
    waves = (127 + 100 * np.sin(x / 3) * np.cos(y / 4)).astype(np.uint8)
    Image.fromarray(np.stack([waves] * 3, axis=2)).save(tmp_path / "photo.jpg", quality=40)
    crops = photograph_crops([tmp_path / "photo.jpg"], size=24, crops=5, seed=0)
    assert crops.shape == (5, 24, 24, 3)
    assert 0 <= crops.min() <= crops.max() <= 1
    assert len({crop.tobytes() for crop in crops}) == 5


def test_faults(tmp_path):
    with pytest.raises(ValueError, match="gan9 unknown; there are nearest"):
        write_generators(tmp_path, {"train": np.zeros((1, 8, 8, 3))}, "genimage", ["gan9"])
    with pytest.raises(ValueError, match="multiples of 8"):
        write_generators(tmp_path, {"train": np.zeros((1, 12, 12, 3))}, "genimage")
