"""Images or cached features, one process or two: the same scores."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import FakeImagesDataModule, FakeImageTransforms
from datamodules.samples import write_fake_images
from lightning_modules.gendet import GenDet, ImageEncoder, LinearProbe, StageSchedule
from lightning_modules.gendet.evaluation import ScoreCollection


def images(root, cache=None, **options):
    return FakeImagesDataModule(
        root=root,
        dataset="genimage",
        train_on=["nearest"],
        transforms=FakeImageTransforms(image_size=32, augmentation="none"),
        cache=cache,
        val_fraction=0.3,
        batch_size=8,
        num_workers=0,
        seed=0,
        **options,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "sample"
    write_fake_images(folder, size=16, image_size=32, generators=["nearest", "spec"])
    return folder


def encoder():
    return ImageEncoder("test_resnet", "timm", None)


def test_cached_features_give_the_scores_of_images(fit, root, tmp_path, trainer):
    schedule = StageSchedule(1, 1, 1)
    module = GenDet(encoder(), schedule, dim=16, heads=2, standardize=True)
    data = images(root, tmp_path / "cache")
    run = fit(module, data, schedule.total)
    assert module.feature_std.min() < 0.9, "standardised by the training reals"
    run.test(module, datamodule=data, verbose=False)
    cached = module.rows
    trainer().test(module, datamodule=images(root), verbose=False)
    assert cached["index"].tolist() == module.rows["index"].tolist()
    for name in ("score", "discrepancy", "teacher"):
        torch.testing.assert_close(cached[name], module.rows[name], atol=1e-4, rtol=1e-4)
    assert not [name for name in module.state_dict() if name.startswith("encoder")]
    run.save_checkpoint(tmp_path / "whole.ckpt")
    again = GenDet(encoder(), schedule, dim=16, heads=2, weights=tmp_path / "whole.ckpt")
    trainer().test(again, datamodule=data, verbose=False)
    torch.testing.assert_close(again.rows["score"], cached["score"])
    assert again.threshold == module.threshold
    batch = next(iter(images_loader(root)))
    torch.testing.assert_close(
        module(batch["image"]), module.score(module.inputs(batch))["score"], atol=1e-5, rtol=1e-5
    )


def images_loader(root):
    data = images(root)
    data.setup("test")
    return data.test_dataloader()


def test_training_on_images_ends_where_training_on_features_does(fit, root, tmp_path):
    ends = []
    for cache in (tmp_path / "cache", None):
        torch.manual_seed(0)
        module = GenDet(encoder(), StageSchedule(1, 1, 1), dim=16, heads=2)
        fit(module, images(root, cache), 5)
        ends.append(module.network.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-4, rtol=1e-4)


def test_standardising_needs_cached_features(fit, root):
    with pytest.raises(MisconfigurationException, match="standardize: true needs cached features"):
        fit(LinearProbe(encoder(), standardize=True), images(root), 1)


def test_two_ranks_score_an_odd_number_of_images_once_each(toy, monkeypatch):
    data = toy(count=13, generators=3, batch_size=4)
    data.setup("test")
    found = []
    for world in (1, 2):
        collection = ScoreCollection()
        for rank in range(world):
            monkeypatch.setattr(data, "_ranks", lambda rank=rank, world=world: (rank, world))
            for batch in data.test_dataloader():
                scores = {"score": batch["features"][:, 0]}
                collection.update(batch["index"], batch["label"], batch["generator"], scores)
        found.append(collection.compute())
    assert len(found[0]["index"]) == 13 * 2 * 3
    for name, values in found[0].items():
        assert torch.equal(found[1][name], values), name
