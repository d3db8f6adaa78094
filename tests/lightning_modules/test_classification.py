from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules import ImageClassifier, WarmupSchedule

tiny = partial(ImageClassifier, "test_vit", 4, model_args={"img_size": 32})


def batch_of(data, count=4):
    return torch.utils.data.default_collate([data.blobs[index] for index in range(count)])


def test_it_learns_the_blobs(trainer, blob_data):
    module = tiny(
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_epochs=1),
        label_smoothing=0.1,
    )
    run = trainer(max_epochs=12)
    data = blob_data(length=64, batch_size=16)
    run.fit(module, datamodule=data)
    metrics = run.test(module, datamodule=data, verbose=False)[0]
    assert metrics["test/top1"] > 0.9
    assert "test/top5" not in metrics  # of four classes the true one is always among five
    rows = run.predict(module, datamodule=data)
    assert set(rows[0]) == {"probabilities", "index", "label"}
    assert rows[0]["probabilities"].sum(dim=1) == pytest.approx(torch.ones(16), abs=1e-5)


def test_normalisation_is_the_models_own_unless_given():
    images = torch.rand(2, 3, 32, 32)
    module = ImageClassifier("resnet18", 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(module.normalize(images), (images - mean) / std)
    module = ImageClassifier("test_resnet", 4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert torch.allclose(module.normalize(images), images * 4 - 2, atol=1e-6)


def test_losses_by_hand(blob_data):
    batch = batch_of(blob_data())
    logits = torch.randn(4, 4)
    module = tiny(label_smoothing=0.1, loss_weight=0.5)
    target = F.one_hot(batch["label"], 4) * 0.9 + 0.1 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert module.losses({"logits": logits}, batch)["ce"].item() == pytest.approx(
        0.5 * expected.item(), rel=1e-6
    )
    module = tiny(label_smoothing=0.1, loss="bce")
    expected = F.binary_cross_entropy(logits.sigmoid(), target)
    assert module.losses({"logits": logits}, batch)["bce"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert tiny(loss_weight=0.0).losses({"logits": logits}, batch) == {}


def test_mixup_mixes_images_and_labels_alike(blob_data):
    batch = batch_of(blob_data())
    module = tiny(mixup=1.0, label_smoothing=0.1)
    mixed = module.augment(batch)
    assert mixed["label"].shape == (4, 4)
    assert mixed["label"].sum(dim=1) == pytest.approx(torch.ones(4), abs=1e-6)
    # the first and the last image are partners: their share of each other is in their labels
    share = (mixed["label"][0, batch["label"][0]].item() - 0.1 / 4) / 0.9
    expected = share * batch["image"][0] + (1 - share) * batch["image"][3]
    assert torch.allclose(mixed["image"][0], expected, atol=1e-5)
    assert not torch.equal(batch["image"], mixed["image"]), "the given batch must stay as it was"


def test_mixup_needs_pairs(blob_data):
    with pytest.raises(MisconfigurationException, match="this one has 3"):
        tiny(mixup=1.0).augment(batch_of(blob_data(), 3))


def test_erasing_changes_a_rectangle_only(blob_data):
    batch = batch_of(blob_data())
    erased = tiny(random_erasing=1.0).augment(batch)["image"]
    changed = (erased - batch["image"]).abs().amax(dim=1) > 1e-4
    assert 0.01 < changed.float().mean() < 0.6
    for image in changed:
        rows, columns = image.any(dim=1).nonzero(), image.any(dim=0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert image.sum() >= 0.95 * area


def test_class_counts_of_data_and_model_must_agree(trainer, blob_data):
    with pytest.raises(MisconfigurationException, match=r"data has 3 classes, but model.num_classes is 4"):
        trainer().fit(tiny(), datamodule=blob_data(classes=3))
