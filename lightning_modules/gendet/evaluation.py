"""Scores of a detector, kept by generator, and what the papers print of them."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from lightning_modules.parts.distributed import first_of_each

REAL, FAKE = 0, 1


class ScoreCollection(Metric):
    """Every image's scores, gathered over the ranks, each image once.

    `update` takes rows with any named score; the names must be the same in every batch.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("index", "label", "generator", "values"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._names: list[str] = []

    def update(self, index: Tensor, label: Tensor, generator: Tensor, scores: dict[str, Tensor]) -> None:
        """Add a batch.

        Args:
            index: position in the data set, (batch,): an image that comes twice counts once.
            label: 0 real, 1 fake, (batch,).
            generator: number of the test set, (batch,).
            scores: each (batch,), larger for "more fake".
        """
        self._names = list(scores)
        values = torch.stack([value.float() for value in scores.values()], dim=1)
        columns = {"index": index, "label": label, "generator": generator, "values": values}
        for name, column in columns.items():
            state: Any = getattr(self, name)
            state.append(column)

    def compute(self) -> dict[str, Tensor]:
        """`index`, `label`, `generator` and every score, (images,), in the order of the data set, on the CPU.

        Raises:
            MisconfigurationException: no image was seen.
        """
        kept = {name: _joined(getattr(self, name)) for name in ("index", "label", "generator", "values")}
        if not len(kept["index"]):
            raise MisconfigurationException("no image was scored.")
        rows = first_of_each(kept["index"])
        values = kept.pop("values")[rows]
        columns = {name: values[:, place] for place, name in enumerate(self._names)}
        return {**{name: column[rows] for name, column in kept.items()}, **columns}


def _joined(state: Any) -> Tensor:
    if isinstance(state, Tensor):
        return state.cpu()
    return torch.cat([part.cpu() for part in state]) if state else torch.empty(0)


@dataclass(frozen=True)
class GeneratorScore:
    """What is printed of one test set; shares in 0..1, None where a class is missing."""

    generator: str
    seen: bool
    real: int
    fake: int
    ap: float | None
    accuracy: float
    real_accuracy: float | None
    fake_accuracy: float | None
    calibrated_accuracy: float
    oracle_accuracy: float
    discrepancy_auc: float | None = None
    teacher_ap: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)


def score_generator(
    name: str, seen: bool, label: Tensor, scores: dict[str, Tensor], calibrated: float
) -> GeneratorScore:
    """The row of one test set.

    Args:
        name: of the generator.
        seen: whether it was trained on.
        label: 0 real, 1 fake, (images,).
        scores: `score` in [0, 1], (images,), and where there are any `discrepancy` and `teacher`.
        calibrated: threshold that was chosen on validation data.
    """
    score, fake = scores["score"], label == FAKE
    both = bool(fake.any()) and not bool(fake.all())
    right = (score > 0.5) == fake
    return GeneratorScore(
        generator=name,
        seen=seen,
        real=int((~fake).sum()),
        fake=int(fake.sum()),
        ap=average_precision(score, label) if both else None,
        accuracy=_mean(right),
        real_accuracy=_mean(right[~fake]) if not fake.all() else None,
        fake_accuracy=_mean(right[fake]) if fake.any() else None,
        calibrated_accuracy=_mean((score >= calibrated) == fake),
        oracle_accuracy=_mean((score >= best_threshold(score, label)) == fake),
        discrepancy_auc=area_under_curve(scores["discrepancy"], label)
        if both and "discrepancy" in scores
        else None,
        teacher_ap=average_precision(scores["teacher"], label) if both and "teacher" in scores else None,
    )


def _mean(right: Tensor) -> float:
    return right.double().mean().item()


def unweighted_mean(rows: list[GeneratorScore], name: str) -> float | None:
    """Mean of a column over the test sets that have a value, whatever their sizes."""
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return sum(values) / len(values) if values else None


def average_precision(scores: Tensor, label: Tensor) -> float:
    """Step-wise average precision, fakes positive; ties are one point."""
    return binary_average_precision(_ranks(scores), label.long()).item()


def area_under_curve(scores: Tensor, label: Tensor) -> float:
    """Area under the ROC curve, fakes positive."""
    return binary_auroc(_ranks(scores), label.long()).item()


def _ranks(scores: Tensor) -> Tensor:
    """Scores as ranks in (0, 1), equal where they are equal: torchmetrics would squash others by a sigmoid,
    and large ones would become equal.
    """
    values, places = torch.unique(scores.double(), return_inverse=True)
    return (places.double() + 1) / (len(values) + 1)


def best_threshold(scores: Tensor, label: Tensor) -> float:
    """The threshold t whose rule "fake where score >= t" is right most often.

    Where the classes separate, half-way between them; otherwise the last of the best among the scores, reals
    first, in the order given: the search of UniversalFakeDetect, which however evaluates with `>`.

    Args:
        scores: (images,), larger for "more fake".
        label: 0 real, 1 fake.
    """
    real, fake = scores[label == REAL].double(), scores[label == FAKE].double()
    if not len(real) or not len(fake):
        return 0.5
    if real.max() <= fake.min():
        return (0.5 * (real.max() + fake.min())).item()
    candidates = torch.cat([real, fake])
    below = torch.searchsorted(real.sort().values, candidates)  # reals under the threshold: right
    missed = torch.searchsorted(fake.sort().values, candidates)
    right = below + len(fake) - missed
    best = (right == right.max()).nonzero().flatten()[-1]
    return candidates[best].item()
