import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules.cifar100 import CIFAR100DataModule, read_pickle
from datamodules.reading import DataError
from datamodules.samples import write_cifar
from datamodules.transforms import ImageTransforms
from tests.fuzzing import fuzz, outcome

SMALL = {
    "transforms": ImageTransforms(image_size=32, augmentation="none", crop_pct=1.0),
    "num_workers": 0,
    "batch_size": 20,
}


def write_published(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks published: two images a file, bytes for keys, torchvision told of its checksums."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    data = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
    batch = {
        b"data": data,
        b"fine_labels": [99, 0],
        b"coarse_labels": [0, 1],
        b"filenames": [b"a.png", b"b.png"],
    }
    names = {
        "fine_label_names": [f"c{i}" for i in range(100)],
        "coarse_label_names": [f"s{i}" for i in range(20)],
    }
    for name, content in (("train", batch), ("test", batch), ("meta", names)):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))

    def checksum(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    published = torchvision.datasets.CIFAR100
    monkeypatch.setattr(published, "train_list", [["train", checksum("train")]])
    monkeypatch.setattr(published, "test_list", [["test", checksum("test")]])
    monkeypatch.setattr(published, "meta", {**published.meta, "md5": checksum("meta")})
    return folder


def test_reads_the_sample(cifar_root):
    data = CIFAR100DataModule(root=cifar_root, **SMALL)
    data.setup("fit")
    assert data.num_classes == len(data.class_names) == 5
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (20, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    raw = pickle.loads((cifar_root / "cifar-100-python/train").read_bytes())
    for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
        expected = torch.from_numpy(raw["data"][index]).reshape(3, 32, 32) / 255
        assert torch.equal(image, expected)
        assert label == raw["fine_labels"][index]


def test_validates_on_the_test_images(cifar_root):
    data = CIFAR100DataModule(root=cifar_root, **SMALL)
    data.setup("fit")
    data.setup("test")
    data.setup("predict")
    loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    first, second, third = ([batch["index"].tolist() for batch in loader] for loader in loaders)
    assert first == second == third == [list(range(15))]
    assert len(data.train_dataloader()) == 3


def test_train_images_keeps_some_of_what_is_not_held_out(cifar_root):
    def split(**options):
        data = CIFAR100DataModule(root=cifar_root, val_fraction=0.25, seed=1, **SMALL, **options)
        data.setup("fit")
        return {name: set(data.datasets[name].indices.tolist()) for name in ("train", "val")}

    everything, few = split(), split(train_images=7)
    assert len(few["train"]) == 7
    assert few["train"] < everything["train"]
    assert few == split(train_images=7)
    assert few["val"] == everything["val"]
    with pytest.raises(DataError, match=r"train_images: 46 are wanted, and .* has 45 to train on"):
        split(train_images=46)
    with pytest.raises(ValueError, match="train_images must be at least 1, got 0"):
        CIFAR100DataModule(train_images=0)


def test_val_fraction_holds_training_images_out(cifar_root):
    def split(seed: int) -> tuple[set[bytes], set[bytes]]:
        data = CIFAR100DataModule(root=cifar_root, val_fraction=0.25, seed=seed, **SMALL)
        data.setup("fit")
        return tuple(
            {sample["image"].tobytes() for sample in data.datasets[name]} for name in ("train", "val")
        )

    train, val = split(1)
    assert (len(train), len(val)) == (45, 15)
    assert not train & val
    assert split(1) == (train, val)
    assert split(2) != (train, val)
    data = CIFAR100DataModule(root=cifar_root, val_fraction=0.25, seed=1, **SMALL)
    data.setup("validate")
    assert {sample["image"].tobytes() for sample in data.datasets["val"]} == val
    assert [sample["index"] for sample in data.datasets["val"]] == list(range(15))


def test_reads_the_published_layout(tmp_path, monkeypatch):
    write_published(tmp_path, monkeypatch)
    data = CIFAR100DataModule(root=tmp_path, **SMALL)
    assert data.num_classes == 100
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["label"].tolist() == [99, 0]
    red_first_row = batch["image"][0, 0, 0] * 255
    assert red_first_row.round().tolist() == list(range(32))
    assert (batch["image"][0, 1, 0, 5] * 255).round() == (1024 + 5) % 256


def test_wrong_checksum(tmp_path, monkeypatch):
    folder = write_published(tmp_path, monkeypatch)
    content = bytearray((folder / "test").read_bytes())
    content[3000] ^= 1
    (folder / "test").write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar-100-python/test is damaged: its md5 is"):
        CIFAR100DataModule(root=tmp_path, **SMALL).setup("test")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was-executed",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickle_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps({"data": Malicious()}, protocol=protocol))
    with pytest.raises(
        pickle.UnpicklingError, match=r"train was refused: it is a pickle that wants to call .*system"
    ):
        read_pickle(path)
    assert not (tmp_path / "was-executed").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_any_protocol_are_read(tmp_path, protocol):
    path = tmp_path / "train"
    path.write_bytes(
        pickle.dumps({b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "x": b"\xff"}, protocol)
    )
    loaded = read_pickle(path)
    assert loaded["data"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["x"] == b"\xff"


def test_python2_pickle_is_read(tmp_path):
    """The published files were written by Python 2: module numpy.core.multiarray, byte strings."""
    path = tmp_path / "train"
    array = pickle.dumps(np.arange(3, dtype=np.uint8), protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in array
    path.write_bytes(b"\x80\x02}U\x04data" + array[2:-1] + b"s.")
    assert read_pickle(path)["data"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "content", [b"", b"no pickle at all", pickle.dumps({"a": 1})[:-3], pickle.dumps([1, 2])]
)
def test_what_is_no_pickle(tmp_path, content):
    (tmp_path / "meta").write_bytes(content)
    with pytest.raises(ValueError, match="meta"):
        read_pickle(tmp_path / "meta")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"fine_labels": [5] * 15}, "labels 5..5, but 5 class names"),
        ({"data": np.zeros((15, 3071), np.uint8)}, "rows of 3072"),
        ({"data": np.zeros((15, 3072))}, "rows of 3072"),
        ({"fine_labels": None}, "is name: cifar100 right"),
        ({"fine_labels": [[0]] * 15}, "'fine_labels' must be a list of integers"),
        ({"fine_labels": "abc"}, "'fine_labels' must be a list of integers"),
        ({"data": [0] * 15}, "rows of 3072 for 15 labels, got list"),
        ({"data": None}, "has no 'data'"),
    ],
    ids=str,
)
def test_inconsistent_files(tmp_path, damage, message):
    write_cifar(tmp_path, size=60, num_classes=5)
    path = tmp_path / "cifar-100-python/test"
    content = {**pickle.loads(path.read_bytes()), **damage}
    path.write_bytes(pickle.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(DataError, match=rf"cifar-100-python/test.*{message}"):
        CIFAR100DataModule(root=tmp_path, **SMALL).setup("test")


@pytest.mark.parametrize("names", [None, [], "abc", [1, 2]])
def test_names_of_classes_that_are_none(tmp_path, names):
    write_cifar(tmp_path, size=60, num_classes=5)
    (tmp_path / "cifar-100-python/meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    with pytest.raises(DataError, match="meta has no list of names fine_label_names"):
        CIFAR100DataModule(root=tmp_path, **SMALL).setup("test")


def test_a_fraction_that_leaves_nothing(cifar_root):
    for fraction in (0.001, 0.999):
        with pytest.raises(DataError, match=rf"val_fraction: {fraction} of 60 training images"):
            CIFAR100DataModule(root=cifar_root, val_fraction=fraction, **SMALL).setup("fit")


@fuzz(60)
@given(
    file=st.sampled_from(["train", "test", "meta"]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    head=st.booleans(),
    cut=st.none() | st.floats(0, 1),
)
def test_mutated_archives_are_read_or_refused(tmp_path, cifar_root, file, edits, head, cut):
    """Of the sample, whose checksums nobody knows; the pixels themselves are left alone half of the time."""
    folder = tmp_path / "cifar-100-python"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cifar_root / "cifar-100-python", folder)
    content = bytearray((folder / file).read_bytes())
    for place, value in edits:
        content[place % min(len(content), 200) if head else -1 - place % min(len(content), 700)] = value
    (folder / file).write_bytes(content if cut is None else content[: int(cut * len(content))])

    def read():
        data = CIFAR100DataModule(root=tmp_path, **SMALL)
        data.setup("fit")
        return [batch for split in ("train", "test") for batch in data.loader(split)]

    result = outcome(read, "cifar-100-python")
    if result.read:
        assert all(0 <= batch["label"].min() <= batch["label"].max() < 5 for batch in result.value)


def test_cifar10(tmp_path):
    data = CIFAR100DataModule(name="cifar10", root=tmp_path, sample=True, sample_size=44, **SMALL)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 10
    assert len(data.datasets["train"]) == 44
    assert len(data.datasets["test"]) == 11
    assert {path.name for path in data.folder.iterdir()} == {
        *(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "sample.json",
    }


def test_num_classes_before_the_data_is_there(tmp_path):
    assert CIFAR100DataModule(root=tmp_path).num_classes == 100
    assert CIFAR100DataModule(root=tmp_path, name="cifar10").num_classes == 10
    data = CIFAR100DataModule(root=tmp_path, sample=True, sample_size=40, sample_classes=7, **SMALL)
    assert data.num_classes == 7
    before = data.class_names
    data.prepare_data()
    assert data.class_names == before
    assert CIFAR100DataModule(root=tmp_path).num_classes == 7


def test_download_is_checked_and_moved_into_place(tmp_path, monkeypatch):
    calls = []

    def fetch(url: str, folder: str, filename: str, md5: str) -> None:
        calls.append((url, filename, md5))
        (Path(folder) / "cifar-100-python").mkdir()
        (Path(folder) / filename).touch()

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    data = CIFAR100DataModule(root=tmp_path / "new", download=True)
    data.prepare_data()
    data.prepare_data()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar-100-python"]
    assert len(calls) == 1
    assert calls[0][1:] == ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")


def test_missing_root_says_what_would_help(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        CIFAR100DataModule(root=tmp_path).setup("fit")
    message = str(caught.value)
    assert str(tmp_path / "cifar-100-python") in message
    assert "{train,test,meta}" in message
    assert "sample: true" in message
    assert "download: true" in message


def test_missing_file_is_named(tmp_path):
    write_cifar(tmp_path, size=20)
    (tmp_path / "cifar-100-python/test").unlink()
    with pytest.raises(FileNotFoundError, match="cifar-100-python/test does not exist"):
        CIFAR100DataModule(root=tmp_path).setup("test")


def test_refuses_options():
    with pytest.raises(ValueError, match="val_fraction"):
        CIFAR100DataModule(val_fraction=1.0)
    with pytest.raises(MisconfigurationException, match="exclude each other"):
        CIFAR100DataModule(sample=True, download=True)
