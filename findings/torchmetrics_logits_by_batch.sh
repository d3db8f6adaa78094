#!/usr/bin/env bash
# torchmetrics 1.9.0: AUROC and accuracy of logits depend on how these fall into batches. Scores are put
# through a sigmoid only if one of the same update lies outside [0, 1], so a batch whose logits happen to lie inside is
# compared as it is with the sigmoids of the others. Seen for four logits that separate the classes: AUROC 1.0 and accuracy
# 0.5 in one update, 0.5 and 0.75 in two. (Probabilities, or ranks, are safe.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.14.1" "torchmetrics==1.9.0" "numpy==2.4.6"
venv/bin/python -W ignore - <<'PYTHON'
import torch
import torchmetrics
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

logits = torch.tensor([0.9, 0.4, 0.95, 1.5])
labels = torch.tensor([0, 0, 1, 1])


def measured(metric: torchmetrics.Metric, *batches: slice) -> float:
    for batch in batches:
        metric.update(logits[batch], labels[batch])
    return round(metric.compute().item(), 3)


whole, parts = [slice(0, 4)], [slice(0, 2), slice(2, 4)]
seen = {
    kind.__name__: (measured(kind(), *whole), measured(kind(), *parts)) for kind in (BinaryAUROC, BinaryAccuracy)
}
print(f"torchmetrics {torchmetrics.__version__}, in one update and in two: {seen}")
assert seen == {"BinaryAUROC": (1.0, 0.5), "BinaryAccuracy": (0.5, 0.75)}
PYTHON
