"""Layouts as published, protocols, what an epoch reads, and the errors."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from datamodules import Degradation, FakeImagesDataModule, FakeImageTransforms
from datamodules.fake_images.layouts import held_out, in_paper_order, limited, read_layout
from datamodules.reading import CorruptSampleError
from tests.fuzzing import fuzz, outcome

COUNTER = itertools.count()


def picture(path, size=(40, 30), seed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(next(COUNTER) if seed is None else seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def pictures(folder, count=4, suffix="png"):
    return [picture(folder / f"{number:03d}.{suffix}") for number in range(count)]


@pytest.fixture
def universal(tmp_path):
    root = tmp_path / "ufd"
    for name in ("car", "cat"):
        for kind in ("0_real", "1_fake"):
            pictures(root / "train" / "progan" / name / kind)
            pictures(root / "val" / "progan" / name / kind, 2)
            pictures(root / "test" / "progan" / name / kind, 3)
    for kind, count in (("0_real", 5), ("1_fake", 4)):
        pictures(root / "test" / "deepfake" / kind, count)
    pictures(root / "diffusion_datasets" / "imagenet" / "0_real", 3, "jpg")
    pictures(root / "diffusion_datasets" / "laion" / "0_real", 6, "JPG")
    for name in ("guided", "ldm_200", "dalle"):
        pictures(root / "diffusion_datasets" / name / "1_fake", 2)
    return root


@pytest.fixture
def genimage(tmp_path):
    root = tmp_path / "genimage"
    for name, archive in (
        ("BigGAN", "imagenet_ai_0419_biggan/"),
        ("ADM", ""),
        ("Midjourney", "imagenet_midjourney/"),
    ):
        for split, count in (("train", 12), ("val", 3)):
            for kind, suffix in (("ai", "PNG"), ("nature", "JPEG")):
                pictures(root / name / f"{archive}{split}" / kind, count, suffix)
    return root


def module(root, **options):
    transforms = FakeImageTransforms(image_size=24, train_resize=28)
    defaults = {"transforms": transforms, "batch_size": 4, "num_workers": 0, "seed": 0}
    return FakeImagesDataModule(root=root, **{**defaults, **options})


def test_the_universal_layout(universal):
    found = read_layout(universal, "universal")
    assert {name: tuple(map(len, pair)) for name, pair in found.train.items()} == {"progan": (8, 8)}
    assert {name: tuple(map(len, pair)) for name, pair in found.val.items()} == {"progan": (4, 4)}
    assert {name: tuple(map(len, pair)) for name, pair in found.test.items()} == {
        "progan": (6, 6),
        "deepfake": (5, 4),
        "guided": (3, 2),
        "ldm_200": (6, 2),
        "dalle": (6, 2),
    }
    assert found.test["ldm_200"].real == found.test["dalle"].real
    assert all("imagenet" in name for name in found.test["guided"].real)
    assert read_layout(universal, "universal", ["cat"]).train["progan"].real[0].split("/")[2] == "cat"


def test_forensynths_own_tree_has_the_classes_directly(universal):
    for name in ("car", "cat"):
        (universal / "train" / "progan" / name).rename(universal / "train" / name)
    (universal / "train" / "progan").rmdir()
    assert tuple(map(len, read_layout(universal, "universal").train["progan"])) == (8, 8)


def test_the_genimage_layout_labels_by_name_not_by_order(genimage):
    found = read_layout(genimage, "genimage")
    assert set(found.train) == {"ADM", "BigGAN", "Midjourney"}
    assert all("/ai/" in name for pair in found.train.values() for name in pair.fake)
    assert all("/nature/" in name for pair in found.test.values() for name in pair.real)
    data = module(genimage, dataset="genimage")
    data.setup("test")
    files = data.datasets["test"]
    labels = {
        name.decode().split("/")[-2]: label for name, label in zip(files.names, files.labels, strict=True)
    }
    assert labels == {"nature": 0, "ai": 1}
    assert data.generator_names == ["Midjourney", "ADM", "BigGAN"]
    assert data.printed_names["Midjourney"] == "Midjourney"


def test_a_held_out_part_validates_and_no_test_image_does(genimage):
    data = module(genimage, dataset="genimage", train_on=["ADM", "BigGAN"], val_fraction=0.3)
    data.setup("fit")
    assert data.seen_generators == ["ADM", "BigGAN"]
    train, val = (set(data.datasets[split].names.tolist()) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 48
    assert not any(b"/val/" in name for name in train | val)


def test_matched_pictures_stay_on_one_side():
    from datamodules.fake_images.layouts import Pair

    names = [f"{number:04d}.png" for number in range(500)]
    pair = Pair([f"nature/{name}" for name in names], [f"ai/{name}" for name in names])
    train, val = held_out(pair, 0.2)
    assert {name[-8:] for name in train.real}.isdisjoint(name[-8:] for name in val.fake)
    assert 60 < len(val.real) < 140


def test_leave_one_out_and_cross_generator(genimage):
    left = module(genimage, dataset="genimage", leave_out=["ADM"], val_fraction=0.3)
    left.setup("test")
    assert left.seen_generators == ["Midjourney", "BigGAN"]
    cross = module(genimage, dataset="genimage", train_on=["ADM"], test_on=["BigGAN"], val_fraction=0.3)
    cross.setup("test")
    assert {cross.generator_names[place] for place in cross.datasets["test"].generators} == {"BigGAN"}
    for options in ({"train_on": ["DALLE9"]}, {"leave_out": ["DALLE9"]}, {"test_on": ["DALLE9"]}):
        with pytest.raises(
            MisconfigurationException, match="no generator DALLE9; it has Midjourney, ADM, BigGAN"
        ):
            module(genimage, dataset="genimage", **options).setup("test")
    with pytest.raises(MisconfigurationException, match="no generator to train on"):
        module(genimage, dataset="genimage", train_on=["ADM"], leave_out=["ADM"]).setup("fit")


def test_the_peer_s_sampling_rule():
    from datamodules.fake_images.layouts import Pair

    files = [f"{number:04d}" for number in range(180)]
    assert tuple(map(len, limited(Pair(files, files), 1000, peer=True))) == (100, 100)
    assert tuple(map(len, limited(Pair(files, files), 1000))) == (180, 180)
    many = [f"{number:05d}" for number in range(3000)]
    drawn = limited(Pair(many, many), 1000, peer=True)
    assert tuple(map(len, drawn)) == (1000, 1000)
    assert drawn == limited(Pair(many, many), 1000, peer=True)
    assert in_paper_order(["dalle", "other", "progan"], "universal") == ["progan", "dalle", "other"]


class Asks:
    """A trainer whose module reads reals in even epochs and fakes in odd ones."""

    current_epoch = 0
    distributed_sampler_kwargs = None
    strategy = None

    @property
    def lightning_module(self):
        return self

    def training_labels(self, epoch):
        return (epoch % 2,)


def test_an_epoch_reads_what_the_module_asks_for(genimage):
    data = module(genimage, dataset="genimage", val_fraction=0.3)
    data.setup("fit")
    both = torch.cat([batch["label"] for batch in data.train_dataloader()])
    assert set(both.tolist()) == {0, 1}
    data.trainer = Asks()
    for epoch in (0, 1):
        data.trainer.current_epoch = epoch
        batches = list(data.train_dataloader())
        assert {label for batch in batches for label in batch["label"].tolist()} == {epoch}
        for batch in batches:
            labels = data.datasets["train"].labels[batch["index"].numpy()]
            assert labels.tolist() == batch["label"].tolist(), "an image keeps its index"


def test_batches(genimage):
    data = module(genimage, dataset="genimage", val_fraction=0.3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 24, 24)
    assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
    assert set(batch) == {"image", "label", "index", "generator"}
    data.setup("predict")
    assert batch["label"].dtype == batch["generator"].dtype == torch.int64
    assert next(iter(data.predict_dataloader()))["path"][0].endswith(".JPEG")


def test_an_incomplete_batch_is_kept_where_there_is_no_whole_one(genimage):
    data = module(genimage, dataset="genimage", train_on=["ADM"], val_fraction=0.3, batch_size=64)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(batch["label"]) == len(data.datasets["train"])
    assert data.drop_last


def test_a_folder_to_predict_on(tmp_path, genimage):
    pictures(tmp_path / "mine" / "deep", 3)
    data = module(genimage, dataset="genimage", predict_folder=tmp_path / "mine")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert [path.rpartition("/")[2] for path in batch["path"]] == ["000.png", "001.png", "002.png"]
    assert "label" not in batch
    for folder, said in ((tmp_path / "none", "there is no folder"), (tmp_path / "empty", "no images in")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=said):
            module(genimage, predict_folder=folder).setup("predict")


def test_missing_classes_name_their_folder(genimage, universal, tmp_path):
    for path in (genimage / "ADM" / "train" / "ai").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"ADM/train has no generated images"):
        module(genimage, dataset="genimage").setup("fit")
    for path in (universal / "test" / "deepfake" / "0_real").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"deepfake has no real images"):
        module(universal, dataset="universal").setup("test")
    with pytest.raises(FileNotFoundError, match="sample: true"):
        module(tmp_path / "nothing").setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no generator with training images"):
        module(tmp_path / "empty").setup("fit")


def test_broken_images_are_named_or_left_out_before_sampling(genimage):
    broken = genimage / "ADM" / "train" / "ai" / "003.PNG"
    broken.write_bytes(b"")
    data = module(genimage, dataset="genimage", train_on=["ADM"], val_fraction=0.3)
    data.setup("fit")
    with pytest.raises(CorruptSampleError, match=r"003\.PNG"):
        [list(data.loader(split)) for split in ("train", "val")]
    data = module(genimage, dataset="genimage", train_on=["ADM"], val_fraction=0.3, on_error="skip")
    data.setup("fit")
    assert sum(len(data.datasets[split]) for split in ("train", "val")) == 23
    assert not any(b"003.PNG" in name for name in data.datasets["train"].names if b"/ai/" in name)


@pytest.mark.parametrize("name", ["train", "progan", "nosuch", "0_real", "000.png"])
def test_classes_are_folders_below_the_generator(universal, name):
    """And not the split's own folder, the generator, the label, or a file."""
    with pytest.raises(
        MisconfigurationException, match=rf"progan|train.*no class folder {name}; it has car, cat"
    ):
        read_layout(universal, "universal", [name])
    with pytest.raises(MisconfigurationException, match=f"has no class folder {name}; it has car, cat"):
        read_layout(universal, "universal", ["car", name])


def test_a_class_that_is_named_like_the_split(tmp_path):
    for name in ("train", "car"):  # both are classes of LSUN
        for kind in ("0_real", "1_fake"):
            pictures(tmp_path / "train" / name / kind, 2)
    found = read_layout(tmp_path, "universal", ["train"]).train["progan"]
    assert [name.split("/")[:2] for name in found.real] == [["train", "train"]] * 2


def test_genimage_has_no_classes(genimage):
    with pytest.raises(MisconfigurationException, match="genimage has no class folders; set classes: null"):
        module(genimage, dataset="genimage", classes=["car"]).setup("fit")


def test_what_is_no_image_of_a_set_is_left_out_and_counted(universal, genimage):
    for folder in (universal / "train/progan/car/1_fake", genimage / "ADM/train/ai"):
        picture(folder / "._000.png")
        picture(folder / "__MACOSX/000.png")
        picture(folder / "deeper/0.webp")
        (folder / "notes.txt").touch()
    found = read_layout(universal, "universal")
    assert tuple(map(len, found.train["progan"])) == (8, 9)
    assert (found.left_out.hidden, found.left_out.other) == (2, 1)
    found = read_layout(genimage, "genimage")
    assert tuple(map(len, found.train["ADM"])) == (12, 13)
    assert (found.left_out.hidden, found.left_out.other) == (2, 1)


def test_links_to_the_own_folder_add_nothing(universal, genimage):
    before = [
        read_layout(root, layout) for root, layout in ((universal, "universal"), (genimage, "genimage"))
    ]
    for folder in (
        universal / "train/progan",
        universal / "train/progan/car/0_real",
        genimage / "ADM",
        genimage / "ADM/train/ai",
        genimage / "BigGAN/imagenet_ai_0419_biggan",
    ):
        for name in ("self", "again"):
            (folder / name).symlink_to(folder)
    (genimage / "BigGAN/other").symlink_to(genimage / "BigGAN/imagenet_ai_0419_biggan")
    after = [read_layout(root, layout) for root, layout in ((universal, "universal"), (genimage, "genimage"))]
    assert [found[:3] for found in after] == [found[:3] for found in before]


NAMES = [
    "train",
    "val",
    "test",
    "ai",
    "nature",
    "0_real",
    "1_fake",
    "progan",
    "car",
    "cat",
    ".x",
    "diffusion_datasets",
]


@fuzz(60)
@given(
    layout=st.sampled_from(["universal", "genimage"]),
    files=st.lists(
        st.tuples(
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=5).map("/".join),
            st.sampled_from(["a.png", "b.JPG", "c.txt", "._d.png"]),
        ),
        max_size=12,
    ),
    classes=st.none() | st.lists(st.sampled_from(["car", "train", "nosuch"]), max_size=2),
    link=st.none() | st.tuples(st.integers(0, 11), st.integers(0, 11)),
)
def test_any_tree_is_read_or_refused(tmp_path, layout, files, classes, link):
    """Whatever is read as real lies in a folder of that name."""
    root = tmp_path / "tree"
    shutil.rmtree(root, ignore_errors=True)
    for folder, name in files:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).touch()
    if link is not None and files:
        source, target = (root / files[place % len(files)][0] for place in link)
        (source / "link").symlink_to(target)
    data = module(root, dataset=layout, classes=classes, val_fraction=0.5)
    result = outcome(lambda: [data.setup(stage) for stage in ("fit", "test")] and data.datasets)
    for dataset in (result.value or {}).values():
        names = [name.decode().split("/") for name in dataset.names]
        assert len(set(map(tuple, names))) == len(names)
        for parts, label in zip(names, dataset.truth, strict=True):
            assert (("nature", "ai") if layout == "genimage" else ("0_real", "1_fake"))[label] in parts[:-1]


def test_a_fraction_that_holds_nothing_out(genimage):
    data = module(genimage, dataset="genimage", train_on=["ADM"], val_fraction=1e-9)
    with pytest.raises(MisconfigurationException, match="val_fraction: 1e-09 leaves no real"):
        data.setup("fit")


def test_a_cache_needs_an_encoder(genimage, tmp_path):
    data = module(genimage, dataset="genimage", cache=tmp_path / "cache", val_fraction=0.3)
    data.trainer = Asks()
    with pytest.raises(MisconfigurationException, match="Asks has no encoder"):
        data.setup("fit")


def test_degradations_change_the_test_and_nothing_else(genimage):
    plain = module(genimage, dataset="genimage", val_fraction=0.3)
    worse = module(genimage, dataset="genimage", val_fraction=0.3, degradation=Degradation(jpeg_quality=30))
    for data in (plain, worse):
        data.setup("fit")
        data.setup("test")
    for split, same in (("val", True), ("test", False)):
        first, second = (next(iter(data.loader(split)))["image"] for data in (plain, worse))
        assert torch.equal(first, second) is same


@pytest.mark.parametrize("dataset", ["universal", "genimage"])
def test_the_sample_is_read_in_both_layouts(tmp_path, dataset):
    data = module(
        tmp_path / dataset,
        dataset=dataset,
        sample=True,
        sample_size=6,
        sample_image_size=16,
        val_fraction=0.5,
    )
    data.prepare_data()
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert sorted(data.generator_names) == ["diff", "nearest", "spec", "tconv", "vae", "vq"]
    assert len(data.datasets["test"]) == 6 * 2 * 3
