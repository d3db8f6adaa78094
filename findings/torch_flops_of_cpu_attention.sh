#!/usr/bin/env bash
# torch 2.14.1 counts no FLOP of scaled_dot_product_attention on the CPU: it runs
# aten._scaled_dot_product_flash_attention_for_cpu, which torch.utils.flop_counter has no formula for, and nothing is
# said about it. Seen for 3 heads of 197 tokens and 64 channels: 0 of 29,805,312, with and without gradients, while
# the first of its two products written out counts 14,902,656. (torch 2.15.0 counts them all.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.14.1" "numpy==2.4.6"
venv/bin/python - <<'PYTHON'
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


q = torch.randn(1, 3, 197, 64)
fused = counted(lambda: scaled_dot_product_attention(q, q, q))
with torch.no_grad():
    without_gradients = counted(lambda: scaled_dot_product_attention(q, q, q))
first_product = counted(lambda: q @ q.transpose(-1, -2))
print(f"torch {torch.__version__}: {fused}, {without_gradients}; the first product alone {first_product}")
assert (fused, without_gradients, first_product) == (0, 0, 14_902_656)
PYTHON
