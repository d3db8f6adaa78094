#!/usr/bin/env bash
# torch 2.14.1: the gradient of clamp at a value that equals its bound depends on how the bound is written: 0 with numbers
# (x.clamp(0, 1)), one half with tensors (torch.clamp(x, low, high)), of the same values. Up to torch 2.10.0 both gave 1.
# So a parameter that starts at the edge of its range, as rounding offsets, clipping scales and relaxed masks of quantizers
# often do, never moves with the first and moves at half the rate with the second. Seen: numbers 0 1 0, tensors 0.5 1 0.5;
# torch 2.10.0: 1 1 1 and 1 1 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 2.10.0 2.14.1; do
    python3 -m venv --clear venv
    venv/bin/pip install --quiet "torch==$version" "numpy==2.4.6"
    venv/bin/python -W ignore - <<'PYTHON'
import sys

import torch

SEEN = {
    "2.10.0": {"numbers": [1.0, 1.0, 1.0], "tensors": [1.0, 1.0, 1.0]},
    "2.14.1": {"numbers": [0.0, 1.0, 0.0], "tensors": [0.5, 1.0, 0.5]},
}
low, high = torch.zeros(3), torch.ones(3)
forms = {"numbers": lambda x: x.clamp(0, 1), "tensors": lambda x: torch.clamp(x, low, high)}
gradients = {}
for name, form in forms.items():
    x = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    form(x).sum().backward()
    gradients[name] = x.grad.tolist()
version = torch.__version__.split("+")[0]
print(version, gradients)
if gradients != SEEN[version]:
    sys.exit(f"changed: expected {SEEN[version]}")

x = torch.zeros(1, requires_grad=True)
optimizer = torch.optim.SGD([x], lr=0.1)
for _ in range(10):
    optimizer.zero_grad()
    (x.clamp(0, 1) - 1).square().sum().backward()
    optimizer.step()
print("a parameter that starts at the bound, after 10 steps of SGD towards 1:", x.item())
if (x.item() == 0) != (version == "2.14.1"):
    sys.exit("changed: expected it to stay at 0 in 2.14.1 alone")
PYTHON
done
