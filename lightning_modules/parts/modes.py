"""Training and evaluation mode of networks that come from elsewhere."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def train_what_is_trained(module: nn.Module) -> None:
    """Put networks that have something to train into training mode.

    Lightning leaves modes as it finds them, and transformers hands its models over in eval mode: without
    dropout. What is frozen stays as it is, a whole network as well as a part of one; so does a norm in eval
    mode inside of a network in training mode, which is how its statistics are frozen.
    """
    _train(module, outer=not module.training)
    module.training = True


def _train(module: nn.Module, outer: bool) -> None:
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            continue
        turned = not child.training and (outer or (bool(parameters) and not isinstance(child, _NormBase)))
        if turned:
            child.training = True
        _train(child, turned)
