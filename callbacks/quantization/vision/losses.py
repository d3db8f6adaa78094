"""Where the gradients of a calibration come from: a loss on what the network says, by what its outputs are
(TinySAM, section 2.5 of the specification).
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.parts.inference import OutputKind

GradSource = Literal["fisher", "sequential_kl", "none"]

_NEAR_ZERO = 1e-4
"""Probabilities are kept that far from 0 and 1."""


def fisher_loss(
    outputs: Mapping[str, Tensor], kinds: Mapping[str, OutputKind], generator: torch.Generator
) -> Tensor:
    """-log p of a sample of the network's own distribution; its squared gradient estimates the Fisher
    information.

    Classes are drawn from their softmax, Bernoulli outputs from their sigmoid, and other numbers are their
    own means with a variance of one. Positions with logits that are not finite (padding) are left out.

    Args:
        outputs: by name; floating-point ones that need gradients count.
        kinds: of outputs; what is not named is `number`.
        generator: on the CPU, so that the draws do not depend on the device.
    """
    total = torch.zeros(())
    for name, output in _with_gradient(outputs):
        kind, flat = kinds.get(name, "number"), output.float()
        if kind == "classes":
            flat = flat.reshape(-1, flat.shape[-1])
            drawn = torch.multinomial(flat.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
            term = F.cross_entropy(flat, drawn.to(flat.device), reduction="sum")
        elif kind == "bernoulli":
            uniform = torch.rand(flat.shape, generator=generator).to(flat.device)
            drawn = (uniform < flat.detach().sigmoid()).float()
            term = F.binary_cross_entropy_with_logits(flat, drawn, reduction="sum")
        else:
            noise = torch.randn(flat.shape, generator=generator).to(flat.device)
            term = (flat - (flat.detach() + noise)).square().sum() / 2
        total = total.to(term.device) + term
    return total


def divergence(
    outputs: Mapping[str, Tensor], full: Mapping[str, Tensor], kinds: Mapping[str, OutputKind]
) -> Tensor:
    """KL of the outputs of a network whose first layers are quantized from those of the full-precision
    network, summed.

    Args:
        outputs: of the quantized network.
        full: of the other.
        kinds: `classes` and `bernoulli` are logits, `probability` lies in [0, 1]; of a `number`, half the
            squared error.
    """
    total = torch.zeros(())
    for name, output in _with_gradient(outputs):
        kind, ours, theirs = kinds.get(name, "number"), output.float(), full[name].float()
        if kind == "classes":
            term = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
        elif kind == "number":
            term = (ours - theirs).square().sum() / 2
        else:
            if kind == "bernoulli":
                ours, theirs = ours.sigmoid(), theirs.sigmoid()
            ours, theirs = (p.clamp(_NEAR_ZERO, 1 - _NEAR_ZERO) for p in (ours, theirs))
            term = F.binary_cross_entropy(ours, theirs, reduction="sum")
            term = term - F.binary_cross_entropy(theirs, theirs, reduction="sum")
        total = total.to(term.device) + term
    return total


def _with_gradient(outputs: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(n, o) for n, o in outputs.items() if o.is_floating_point() and o.requires_grad]
