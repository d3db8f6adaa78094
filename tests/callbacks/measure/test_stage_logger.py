import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from callbacks import StageLogger
from callbacks.measure.stage_logger import CURVES, stage_means, stage_sums
from lightning_modules import GenDet, ImageClassifier, StageSchedule
from lightning_modules.gendet.losses import agreement_loss, disagreement_loss


class Stub(nn.Module):
    width, model = 10, "stub"


def made():
    torch.manual_seed(0)
    return GenDet(Stub(), StageSchedule(1, 1, 1), dim=8, heads=2)


def batch(count=20):
    labels = torch.arange(count) % 3 == 0
    return {"features": torch.randn(count, 10), "label": labels.long()}


@torch.no_grad()
def test_means_over_batches_are_means_over_images():
    module, whole = made(), batch()
    parts = [
        {name: values[rows] for name, values in whole.items()}
        for rows in (slice(0, 1), slice(1, 7), slice(7, 20))
    ]
    summed = [stage_sums(module, part) for part in parts]
    found = stage_means({name: sum(part[name] for part in summed) for name in summed[0]})
    network, fake = module.network, whole["label"] == 1
    embedded = network.embed(whole["features"])
    moved = network.augmenter(embedded[fake])
    pair = network.teacher(moved), network.student(moved)
    expected = {
        "real_loss": agreement_loss(network.teacher(embedded[~fake]), network.student(embedded[~fake])),
        "fake_loss": disagreement_loss(*pair),
        "augmenter_loss": agreement_loss(*pair),
        "cosine": torch.cosine_similarity(*pair).mean(),
        "discrepancy": network.discrepancy(embedded[fake]).mean(),
        "variance": moved.var(dim=0, unbiased=False).mean(),
    }
    assert tuple(expected) == CURVES
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name


def test_reals_alone_have_no_fake_loss():
    rows = batch()
    rows["label"][:] = 0
    found = stage_means(stage_sums(made(), rows))
    assert found["fake_loss"] == found["variance"] == 0
    assert found["real_loss"] > 0


def test_only_gendet_has_stages(trainer, blob_data):
    with pytest.raises(MisconfigurationException, match="ImageClassifier has none"):
        trainer(callbacks=[StageLogger()]).fit(ImageClassifier("test_vit", 4), datamodule=blob_data())


def test_the_curves_are_kept_in_the_checkpoint():
    logger, other = StageLogger(), StageLogger()
    logger._history = [[0.0, 1.0, 2.0]]
    other.load_state_dict(logger.state_dict())
    assert other.state_dict() == logger.state_dict()
