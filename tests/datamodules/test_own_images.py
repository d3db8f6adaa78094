"""Class folders of one's own: what is held out, what is said, and a recipe that needs only the folder."""

import logging

import numpy as np
import pytest
from PIL import Image

import featherlight as featherlight_module
from datamodules import ImageFolderDataModule
from datamodules.reading import DataError

COUNTS = {"cat": 10, "dog": 5, "emu": 1}


@pytest.fixture
def flat(tmp_path):
    """`<root>/<class>/*.png`, each class of a brightness of its own."""
    for grey, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((32, 32, 3), 100 * grey + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def files(dataset):
    return {dataset.path(index) for index in range(len(dataset))}


def test_a_share_of_every_class_is_held_out_by_the_seed(flat, caplog):
    data = ImageFolderDataModule(root=flat, val_fraction=0.2, seed=1)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert data.class_names == list(COUNTS)
    assert np.bincount(data.datasets["val"].labels).tolist() == [2, 1]  # a class of one image is only trained
    assert np.bincount(data.datasets["train"].labels).tolist() == [8, 4, 1]
    assert not files(data.datasets["train"]) & files(data.datasets["val"])
    assert "classes: 0 cat (10), 1 dog (5), 2 emu (1)" in caplog.text
    assert "3 of them, 0.2 of each class, are held out for evaluation (val_fraction, seed 1)" in caplog.text
    held_out = {}
    for seed, stage, split in ((1, "test", "test"), (1, "predict", "predict"), (2, "validate", "val")):
        other = ImageFolderDataModule(root=flat, val_fraction=0.2, seed=seed)
        other.setup(stage)
        held_out[seed, stage] = files(other.datasets[split])
    assert held_out[1, "test"] == held_out[1, "predict"] == files(data.datasets["val"])
    assert held_out[2, "validate"] != held_out[1, "test"]


def test_test_images_never_serve_as_validation_unsaid(flat, caplog):
    (flat / "train").mkdir()
    for name in COUNTS:
        (flat / name).rename(flat / "train" / name)
    with pytest.raises(DataError, match="no folder val to validate on: set val_fraction"):
        ImageFolderDataModule(root=flat).setup("fit")
    (flat / "test" / "cat").mkdir(parents=True)
    (flat / "train" / "cat" / "0.png").rename(flat / "test" / "cat" / "0.png")
    with caplog.at_level(logging.INFO):
        ImageFolderDataModule(root=flat).setup("fit")
    assert "no folder val, so the images of test are the val data too" in caplog.text
    data = ImageFolderDataModule(root=flat, val_fraction=0.25)
    data.setup("fit")
    assert not any("/test/" in path for path in files(data.datasets["val"]))


def test_an_empty_folder_is_named_by_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    options = ["--config", "images", "--data.init_args.root", "photos", "--model.init_args.weights", "null"]
    assert featherlight_module.main(["fit", *options]) == 2
    assert "error: photos has no class folders. Expected under root=photos: " in capsys.readouterr().err
    (tmp_path / "photos" / "cat").mkdir()
    assert featherlight_module.main(["fit", *options]) == 2
    assert "num_classes: 1; two classes or more are needed" in capsys.readouterr().err


def test_too_few_to_hold_out(flat):
    for path in (*flat.glob("cat/*"), *flat.glob("dog/*")):
        path.unlink()
    for name in ("cat", "dog"):
        (flat / name).rmdir()
    with pytest.raises(DataError, match=r"val_fraction: 0.5 of 1 images in .*photos leaves none"):
        ImageFolderDataModule(root=flat, val_fraction=0.5).setup("fit")
    with pytest.raises(ValueError, match="val_fraction: must be at least 0 and below 1"):
        ImageFolderDataModule(root=flat, val_fraction=1.0)


def test_three_commands_from_a_folder_to_named_predictions(flat, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--model.init_args.model", "test_vit", "--model.init_args.weights", "null"]
    small += [
        "--model.init_args.model_args",
        "{img_size: 32}",
        "--data.init_args.transforms.image_size",
        "32",
    ]
    small += ["--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]
    images = ["--config", "images", *small]
    fit = ["--data.init_args.batch_size", "4", "--trainer.max_epochs", "1"]
    assert featherlight_module.main(["fit", *images, *fit, "--data.init_args.root", "photos"]) == 0
    new = ["--data", "ImagesDataModule", "--data.init_args.root", "photos/dog", "--ckpt_path", "best"]
    assert featherlight_module.main(["predict", *images, *new, "--trainer.callbacks+=predictions"]) == 0
    rows = (tmp_path / "runs" / "images" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + COUNTS["dog"]
    assert {row.split(",")[5] for row in rows[1:]} <= set(COUNTS)
    assert "0.png" in rows[1]
