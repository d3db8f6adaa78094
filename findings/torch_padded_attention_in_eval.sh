#!/usr/bin/env bash
# torch 2.14.1: nn.MultiheadAttention and nn.TransformerEncoderLayer give a sample all of whose tokens are padding a finite
# result in training, and in eval mode with gradients, but NaN in eval mode without gradients, where their fused path runs.
# So an empty caption or an empty set of objects trains and breaks validation alone. nn.MultiheadAttention gives NaN in every
# mode as soon as it is asked for its weights. nn.TransformerEncoder, which packs tokens there, gives zeros.
# Seen: finite, finite, NaN; with weights NaN; encoder 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.14.1" "numpy==2.4.6"
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(2, 4, 8)
padding = torch.tensor([[False, False, False, True], [True] * 4])
attention = nn.MultiheadAttention(8, 2, batch_first=True)
layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
encoder = nn.TransformerEncoder(layer, 1)


def state(result: torch.Tensor) -> str:
    assert result[0, :3].isfinite().all()  # the sample that has tokens
    padded = result[1]
    return "NaN" if padded.isnan().all() else "zeros" if not padded.any() else "finite"


def attended(need_weights: bool = False) -> torch.Tensor:
    # zeros before the output projection, whose bias is made other than 0
    return attention(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]


nn.init.ones_(attention.out_proj.bias)
seen = {}
for mode, training, gradients in (("train", True, True), ("eval", False, True), ("eval, no grad", False, False)):
    for module in (attention, layer, encoder):
        module.train(training)
    with torch.set_grad_enabled(gradients):
        seen[mode] = (
            state(attended()),
            state(attended(need_weights=True)),
            state(layer(x, src_key_padding_mask=padding)),
            state(encoder(x, src_key_padding_mask=padding)),
        )
print("attention, attention with weights, layer, encoder")
for mode, states in seen.items():
    print(f"torch {torch.__version__}, {mode}: {', '.join(states)}")
finite = ("finite", "NaN", "finite", "finite")
assert seen == {"train": finite, "eval": finite, "eval, no grad": ("NaN", "NaN", "NaN", "zeros")}
PYTHON
