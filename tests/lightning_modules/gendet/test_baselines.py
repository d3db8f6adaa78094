import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.gendet import CNNDetector, ImageEncoder, LinearProbe, NearestNeighbors


def test_the_probe_learns_the_seen_generator(fit, toy, stub):
    module, data = LinearProbe(stub()), toy(count=128)
    run = fit(module, data, 8)
    run.test(module, datamodule=data, verbose=False)
    (seen,) = (row for row in module.generator_scores if row.seen)
    assert seen.ap > 0.9
    assert seen.discrepancy_auc is None
    metrics = run.callback_metrics
    assert metrics["test/seen/ap"] == pytest.approx(seen.ap, abs=1e-6)
    assert metrics["test/unseen/ap"] < seen.ap


def test_the_released_probe_loads_by_its_own_names(tmp_path):
    released = {"weight": torch.randn(1, 768), "bias": torch.randn(1)}
    torch.save(released, tmp_path / "fc_weights.pth")
    probe = LinearProbe(ImageEncoder(weights=None), weights=tmp_path / "fc_weights.pth")
    x = torch.randn(4, 768)
    torch.testing.assert_close(probe(x), (x @ released["weight"][0] + released["bias"]).sigmoid())


def test_the_released_cnn_loads_by_its_own_names(tmp_path):
    torch.manual_seed(0)
    released = timm.create_model("resnet18", num_classes=1)  # torchvision's names, as resnet50's
    torch.save({"model": released.state_dict(), "total_steps": 5}, tmp_path / "blur_jpg_prob0.1.pth")
    cnn = CNNDetector("resnet18", weights=tmp_path / "blur_jpg_prob0.1.pth").eval()
    images = torch.rand(2, 3, 32, 32)
    expected = released.eval()((images - cnn.mean) / cnn.std).squeeze(1).sigmoid()
    torch.testing.assert_close(cnn(images), expected)


def test_a_cnn_on_cached_features_is_refused(trainer, toy):
    data = toy()
    data.cache = "somewhere"
    with pytest.raises(MisconfigurationException, match="CNNDetector reads images"):
        trainer().fit(CNNDetector("test_resnet", weights=None), datamodule=data)


@pytest.mark.parametrize("k", [1, 3])
def test_the_nearer_bank_wins(fit, toy, stub, k, tmp_path):
    module, data = NearestNeighbors(stub(), k=k), toy(drop_last=False)
    run = fit(module, data, 1)
    rows = data.sets["train"].__getitems__(list(range(128)))
    order = module.bank.sum(1).argsort()
    theirs = rows["features"].sum(1).argsort()
    torch.testing.assert_close(module.bank[order], rows["features"][theirs])
    x = data.sets["test"].__getitems__(list(range(40)))["features"]
    similarity = F.cosine_similarity(x[:, None], rows["features"][None], dim=2)
    best = [similarity[:, rows["label"] == label].topk(k).values.mean(1) for label in (0, 1)]
    torch.testing.assert_close(module.score(x)["score"] > 0.5, best[1] > best[0])
    run.save_checkpoint(tmp_path / "bank.ckpt")
    fresh = NearestNeighbors(stub(), k=k)
    with pytest.raises(MisconfigurationException, match="0 real images in its bank"):
        fresh.score(x)
    fresh.load_state_dict(torch.load(tmp_path / "bank.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(fresh.score(x)["score"], module.score(x)["score"])


def test_neighbours_must_be_some(stub):
    with pytest.raises(ValueError, match="k: 0"):
        NearestNeighbors(stub(), k=0)
