import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules.samples import write_cifar, write_image_folders, write_pictures
from datamodules.samples.drawing import MAX_CLASSES, class_name, class_parts, draw_picture
from datamodules.samples.writing import MARKER, ensure_sample, is_sample


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


def test_a_hundred_different_classes():
    assert len({class_name(label) for label in range(MAX_CLASSES)}) == MAX_CLASSES == 100
    shapes, textures = zip(*map(class_parts, range(10)), strict=True)
    assert len(set(shapes)) == len(set(textures)) == 10


@pytest.mark.parametrize("size", [(64, 64), (40, 70), (70, 40), (8, 8)])
def test_every_class_can_be_drawn(size):
    for label in range(0, 100, 7):
        picture = draw_picture(label, *size, np.random.default_rng(label))
        assert picture.shape == (*size, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 10


def test_classes_differ_more_than_pictures_of_one_class():
    """Nearest class mean on colour histograms: better than chance, far from perfect."""

    def histogram(label: int, rng: np.random.Generator) -> np.ndarray:
        picture = draw_picture(label, 32, 32, rng) // 64
        counts = np.bincount(picture.reshape(-1, 3) @ np.array([16, 4, 1]), minlength=64)
        return np.sqrt(counts / counts.sum())

    rng = np.random.default_rng(0)
    means = np.stack([np.mean([histogram(label, rng) for _ in range(40)], 0) for label in range(10)])
    hits = [
        np.square(means - histogram(label, rng)).sum(1).argmin() == label
        for label in range(10)
        for _ in range(20)
    ]
    assert 0.15 < np.mean(hits) < 0.7


def test_cifar_files_have_the_published_form(tmp_path):
    write_cifar(tmp_path, size=40, num_classes=6)
    folder = tmp_path / "cifar-100-python"
    train, test, meta = (pickle.loads((folder / name).read_bytes()) for name in ("train", "test", "meta"))
    assert set(train) == {"data", "fine_labels", "coarse_labels", "filenames", "batch_label"}
    assert train["data"].shape == (40, 3072)
    assert train["data"].dtype == np.uint8
    assert test["data"].shape == (10, 3072)
    assert len(meta["fine_label_names"]) == 6
    assert set(train["fine_labels"]) == set(range(6))
    assert set(train["coarse_labels"]) <= set(range(len(meta["coarse_label_names"])))
    assert sorted(np.bincount(train["fine_labels"])) == [6, 6, 7, 7, 7, 7]


def test_hundred_classes_have_twenty_superclasses(tmp_path):
    write_cifar(tmp_path, size=100, num_classes=100)
    meta = pickle.loads((tmp_path / "cifar-100-python/meta").read_bytes())
    assert len(set(meta["fine_label_names"])) == 100
    assert len(set(meta["coarse_label_names"])) == 20


def test_image_folders(tmp_path):
    write_image_folders(tmp_path / "images", size=9, num_classes=3, wnids=True, image_size=20)
    names = ["n90000000", "n90000001", "n90000002"]
    assert [path.name for path in sorted((tmp_path / "images/train").iterdir())] == names
    files = list((tmp_path / "images/train").rglob("*.JPEG"))
    assert len(files) == 9
    for path in files:
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert min(image.size) == 20


@pytest.mark.parametrize(
    "write",
    [
        lambda root, seed: write_cifar(root, size=20, seed=seed),
        lambda root, seed: write_image_folders(root, size=20, image_size=16, seed=seed),
        lambda root, seed: write_pictures(root, size=3, image_size=16, seed=seed),
    ],
    ids=["cifar", "folders", "pictures"],
)
def test_same_seed_same_bytes(tmp_path, write):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_train_and_test_images_differ(tmp_path):
    write_cifar(tmp_path, size=40)
    train, test = (
        pickle.loads((tmp_path / "cifar-100-python" / s).read_bytes())["data"] for s in ("train", "test")
    )
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_is_written_once(tmp_path):
    write_cifar(tmp_path, size=20)
    before = (tmp_path / "cifar-100-python/train").stat().st_mtime_ns
    write_cifar(tmp_path, size=20)
    assert (tmp_path / "cifar-100-python/train").stat().st_mtime_ns == before
    assert is_sample(tmp_path / "cifar-100-python")


def test_other_settings_are_refused(tmp_path):
    write_cifar(tmp_path, size=20)
    with pytest.raises(MisconfigurationException, match=r"'size': 20.*'size': 40.*Delete that folder"):
        write_cifar(tmp_path, size=40)


def test_real_data_is_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(
        MisconfigurationException, match=r"sample: true, but .* holds data that is not a sample"
    ):
        write_image_folders(tmp_path, size=10)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_empty_folder_is_filled(tmp_path):
    write_pictures(tmp_path, size=2, image_size=16)
    assert is_sample(tmp_path)


def test_failed_writer_leaves_nothing(tmp_path):
    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ensure_sample(tmp_path / "data/sample", {}, write)
    assert list((tmp_path / "data").iterdir()) == []


def test_simultaneous_writers(tmp_path):
    """All return with the sample in place; one of them wrote it."""

    all_are_writing = Barrier(4, timeout=20)

    def fill(folder: Path) -> None:
        all_are_writing.wait()
        (folder / "content").touch()

    def write(_: int) -> bool:
        ensure_sample(tmp_path / "sample", {"a": 1}, fill)
        return (tmp_path / "sample/content").exists()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample"]
    assert json.loads((tmp_path / "sample" / MARKER).read_text()) == {"a": 1}
