"""The metrics of text tasks as GLUE and CoNLL define them; torchmetrics' where it agrees."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "entity_f1"]
Span = tuple[str, int, int]
"""Type, first token, and the one behind the last."""


def matthews(confusion: Tensor) -> Tensor:
    """Matthews' correlation of a confusion matrix (2, 2), rows true; 0 where a marginal is empty (GLUE)."""
    (tn, fp), (fn, tp) = confusion.double()
    marginals = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return torch.where(marginals > 0, (tp * tn - fp * fn) / marginals.clamp(min=1).sqrt(), 0.0)


class MatthewsCorrelation(Metric):
    """Matthews' correlation as GLUE counts it: of constant predictions it is 0.

    (torchmetrics' coefficient is something else there.)
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confusion", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add the classes (n,) that were predicted, and the true ones (n,)."""
        self.confusion += torch.bincount(2 * labels + predictions, minlength=4).view(2, 2)

    def compute(self) -> Tensor:
        """Over all that was added."""
        return matthews(self.confusion).float()


def entity_spans(tags: Sequence[str]) -> set[Span]:
    """Entities of a sentence, conlleval's rule: IOB1 and IOB2 alike.

    `B-` always starts one; `I-` starts one at the beginning, after `O`, and after another type.
    """
    spans: set[Span] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            spans.add((kind, start, place))
            kind = ""
        if not kind and prefix in ("B", "I"):
            kind, start = name, place
    return spans


def precision_recall_f1(correct: float, predicted: float, gold: float) -> tuple[float, float, float]:
    """Micro precision, recall and F1; 0 where undefined."""
    precision = correct / predicted if predicted else 0.0
    recall = correct / gold if gold else 0.0
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


class EntityF1(Metric):
    """Micro F1 of entities: exact span and type.

    Args:
        tags: names of the tags, such as `O`, `B-PER`, in the order of their numbers.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = list(tags)
        self.add_state("counts", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add the tags (B, L) that were predicted, and the true ones (B, L), -100 where there is no word."""
        found = []
        for guess, truth in zip(predictions.tolist(), labels.tolist(), strict=True):
            known = [(g, t) for g, t in zip(guess, truth, strict=True) if t != -100]
            ours = entity_spans([self.tags[g] for g, _ in known])
            gold = entity_spans([self.tags[t] for _, t in known])
            found.append((len(ours & gold), len(ours), len(gold)))
        self.counts += torch.tensor(found, dtype=torch.float64, device=self.counts.device).sum(dim=0)

    def compute(self) -> Tensor:
        """Over all that was added."""
        return torch.tensor(precision_recall_f1(*self.counts.tolist())[2], device=self.counts.device)


def build_metric(name: MetricName, num_classes: int, tags: Sequence[str] | None = None) -> Metric:
    """The metric of a name, which is updated with (predictions, labels).

    Args:
        name: of the metric.
        num_classes: of the task; 1 where it predicts a number.
        tags: names of the classes, for `entity_f1`.
    """
    if name == "entity_f1":
        return EntityF1(tags or [str(number) for number in range(num_classes)])
    makers: dict[str, Callable[[], Metric]] = {
        "accuracy": lambda: MulticlassAccuracy(num_classes, average="micro"),
        "f1": BinaryF1Score,
        "matthews": MatthewsCorrelation,
        "pearson": PearsonCorrCoef,
        "spearman": SpearmanCorrCoef,
    }
    return makers[name]()
