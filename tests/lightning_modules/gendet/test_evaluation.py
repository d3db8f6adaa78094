import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.gendet.evaluation import (
    GeneratorScore,
    ScoreCollection,
    average_precision,
    best_threshold,
    score_generator,
    unweighted_mean,
)

LABEL = torch.tensor([0, 0, 0, 1, 1, 1])


def test_average_precision():
    assert average_precision(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), LABEL) == 1.0
    assert average_precision(torch.full((6,), 0.7), LABEL) == pytest.approx(0.5)
    scores = torch.tensor([0.3, 0.2, 0.6, 0.1, 0.6, 0.9])
    for changed in (scores + 100, scores * 1e-6, scores.exp()):
        assert average_precision(changed, LABEL) == pytest.approx(average_precision(scores, LABEL))
    # ranked 0.9 (fake), then the pair at 0.6 (fake and real) as one point, then the last fake
    assert average_precision(scores, LABEL) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)


def test_large_scores_keep_their_order():
    scores = torch.tensor([30.0, 31.0, 32.0, 33.0, 34.0, 35.0])  # a sigmoid makes them all 1
    assert average_precision(scores, LABEL) == 1.0


def test_the_best_threshold_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    label = torch.tensor([0] * 30 + [1] * 20)
    scores = torch.rand(50, generator=generator) + 0.3 * label
    accuracy = {t.item(): ((scores >= t).long() == label).double().mean().item() for t in scores}
    found = best_threshold(scores, label)
    assert ((scores.double() >= found).long() == label).double().mean() == max(accuracy.values())
    assert best_threshold(torch.tensor([0.1, 0.2, 0.9, 1.0]), torch.tensor([0, 0, 1, 1])) == pytest.approx(
        0.55
    )


def test_one_half_is_strict_and_classes_may_lack():
    row = score_generator("x", False, LABEL, {"score": torch.full((6,), 0.5)}, 0.5)
    assert (row.accuracy, row.real_accuracy, row.fake_accuracy) == (0.5, 1.0, 0.0)
    assert row.calibrated_accuracy == 0.5
    only = score_generator(
        "y", True, torch.ones(3, dtype=torch.long), {"score": torch.tensor([0.4, 0.6, 0.7])}, 0.5
    )
    assert (only.ap, only.real_accuracy, only.real, only.fake) == (None, None, 0, 3)
    assert unweighted_mean([row, only], "ap") == row.ap
    assert unweighted_mean([only], "ap") is None


def test_means_of_the_published_table():
    accuracy = (
        "99 99.5 99.3 99.05 99 96.75 88.2 63.5 67.5 93.9 98.75 98.7 98.8 98.6 98.75 98.75 98.75 98.75 98.45"
    )
    ap = "99.95 99.95 99.92 99.92 99.92 99.25 91.38 61.23 72.66 97.9 98.88 99.3 99.85 99.51 99.85 99.5 99.46"
    printed = {94.42: accuracy, 95.64: f"{ap} 99.19 99.47"}
    for mean, cells in printed.items():
        rows = [GeneratorScore("", False, 1, 1, float(cell), 0, 0, 0, 0, 0) for cell in cells.split()]
        assert len(rows) == 19
        assert unweighted_mean(rows, "ap") == pytest.approx(mean, abs=0.01)
    genimage = [89.6, 96.1, 96.1, 58.0, 78.4, 92.8, 66.5, 75.0]
    assert sum(genimage) / 8 == pytest.approx(81.6, abs=0.05)


def test_an_image_that_comes_twice_counts_once():
    scores = ScoreCollection()
    index = torch.tensor([3, 1, 2, 1])
    label, generator = torch.tensor([1, 0, 1, 0]), torch.zeros(4, dtype=torch.long)
    scores.update(index, label, generator, {"score": torch.tensor([0.9, 0.2, 0.7, 0.2])})
    scores.update(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), {"score": torch.tensor([0.1])})
    rows = scores.compute()
    assert rows["index"].tolist() == [0, 1, 2, 3]
    assert rows["score"].tolist() == pytest.approx([0.1, 0.2, 0.7, 0.9])
    assert rows["label"].tolist() == [0, 0, 1, 1]
    scores.reset()
    with pytest.raises(MisconfigurationException, match="no image"):
        scores.compute()
