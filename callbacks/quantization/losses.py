"""The reconstruction loss of CBQ: squared error and divergence of hidden states (spec 2.5)."""

import torch
from torch import Tensor


def hidden_error(
    target: Tensor, output: Tensor, mask: Tensor | None = None, l2: bool = True, kl: bool = True
) -> Tensor:
    """E(h1, h2) = mean squared error + KL(softmax(h1) || softmax(h2)), softmax over the hidden dimension.

    Args:
        target: h1, (..., tokens, hidden).
        output: h2, same shape.
        mask: (..., tokens), False (0) where a token is padding; None counts all.
        l2: with the squared error, a mean over all elements.
        kl: with the divergence, a sum over hidden and a mean over tokens, in nats, computed in float32 at
            least.

    Returns:
        A scalar.
    """
    if mask is not None:
        keep = mask.bool()
        target, output = target[keep], output[keep]
    if target.dtype in (torch.float16, torch.bfloat16):
        target = target.float()
    output = output.to(target.dtype)
    error = output.new_zeros(())
    if l2:
        error = error + (target - output).square().mean()
    if kl:
        log_target, log_output = target.log_softmax(-1), output.log_softmax(-1)
        error = error + (log_target.exp() * (log_target - log_output)).sum(-1).mean()
    return error


def reconstruction_loss(
    target: Tensor,
    homologous: Tensor | None,
    output: Tensor,
    mask: Tensor | None = None,
    l2: bool = True,
    kl: bool = True,
) -> Tensor:
    """L_rec = E(H_fp, H_q) + E(H_homo, H_q), the second only where its target is given."""
    loss = hidden_error(target, output, mask, l2, kl)
    if homologous is not None:
        loss = loss + hidden_error(homologous, output, mask, l2, kl)
    return loss
