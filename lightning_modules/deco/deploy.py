"""A trained network in its inference form: fewer operations, the same outputs."""

from copy import deepcopy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from lightning_modules.deco.layers import ConvNeXtBlock, InteractionLayer
from lightning_modules.deco.network import DetectionNetwork
from lightning_modules.deco.plus_encoder import RepBlock

Network = TypeVar("Network", bound=DetectionNetwork)

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


@torch.no_grad()
def deploy(network: Network, channels_last: bool = True) -> Network:
    """A copy for inference; the given network stays as it is.

    Rep blocks become single convolutions, batch norms go into the convolutions before them, layer scales into
    the linear layers before them, and of the heads those of the last layer remain. Its outputs are those of
    `network` in eval mode up to rounding, its parameters are frozen, and it cannot be trained.

    Args:
        network: on any device.
        channels_last: keep weights and features with their channels innermost, where the pointwise layers
            and norms of the networks read them without a copy.
    """
    network = deepcopy(network).eval().requires_grad_(False)
    network.drop_auxiliary()
    fuse_rep_blocks(network)
    fold_batch_norms(network)
    fold_layer_scales(network)
    for activation in network.modules():
        if isinstance(activation, (nn.ReLU, nn.SiLU)):
            activation.inplace = True
    if channels_last:
        network.to(memory_format=torch.channels_last)
    return network.requires_grad_(False)


def fuse_rep_blocks(network: nn.Module) -> None:
    """Replace every Rep block in place by its single convolution; eval mode."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RepBlock):
                setattr(parent, name, child.fused())


def fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch norm, frozen or not, that stands behind a convolution into it, in place; eval mode."""
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (before, conv), (name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _NORMS):
                setattr(parent, before, fuse_conv_bn_eval(conv, norm))
                setattr(parent, name, nn.Identity())


def fold_layer_scales(network: nn.Module) -> None:
    """Fold each gamma into the linear layer whose output it scales, in place."""
    for module in network.modules():
        if isinstance(module, ConvNeXtBlock):
            _fold_scale(module, "gamma", module.pwconv2)
        elif isinstance(module, InteractionLayer):
            _fold_scale(module, "gamma1", module.pwconv1_2)
            _fold_scale(module, "gamma2", module.pwconv2_2)


def _fold_scale(owner: nn.Module, name: str, linear: nn.Linear) -> None:
    gamma = getattr(owner, name)
    if gamma is None:
        return
    linear.weight.mul_(gamma[:, None])
    linear.bias.mul_(gamma)
    setattr(owner, name, None)
