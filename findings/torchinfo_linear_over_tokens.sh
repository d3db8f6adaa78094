#!/usr/bin/env bash
# torchinfo 1.8.0 counts the multiply-adds of a Linear once per sample, however many tokens it is applied to, and says
# nothing: its total for a vision transformer is too small by almost the number of tokens. A convolution of one by one pixel
# that does the same to the same tokens is counted for each of them, and so is a Linear whose input has no batch dimension.
# Seen for 64 x 64 weights and 197 tokens: Linear 4,096, convolution 806,912; timm 1.0.31's vit_small_patch16_224
# 0.08 G, where its linear layers alone have 4.2 G.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6" "timm==1.0.31" "torchinfo==1.8.0"
venv/bin/python -W ignore - <<'PYTHON'
import timm
import torch
from torch import nn
from torchinfo import summary


def counted(module: nn.Module, *shape: int) -> int:
    return summary(module, input_size=shape, verbose=0).total_mult_adds


linear = counted(nn.Sequential(nn.Linear(64, 64, bias=False)), 1, 197, 64)
without_batch = counted(nn.Sequential(nn.Linear(64, 64, bias=False)), 197, 64)
convolution = counted(nn.Sequential(nn.Conv1d(64, 64, 1, bias=False)), 1, 64, 197)
print("linear", linear, "without a batch dimension", without_batch, "convolution", convolution)
assert (linear, without_batch, convolution) == (64 * 64, 197 * 64 * 64, 197 * 64 * 64)

model = timm.create_model("vit_small_patch16_224").eval()
total = counted(model, 1, 3, 224, 224)
inside = 0


def count(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    global inside
    inside += output.numel() * module.in_features


for module in model.modules():
    if isinstance(module, nn.Linear):
        module.register_forward_hook(count)
with torch.no_grad():
    model(torch.zeros(1, 3, 224, 224))
print("vit_small_patch16_224", total, "its linear layers alone", inside)
assert total < inside / 50
PYTHON
