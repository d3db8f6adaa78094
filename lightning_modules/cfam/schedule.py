"""Linear warm-up by a factor, then a half cosine to zero, by the epoch (section 3)."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.parts.options import check


class WarmupCosine(LambdaLR):
    """The rate of every group times `rate_factor(epoch)`.

    Args:
        optimizer: whose groups have their own base rates.
        epochs: length of the run.
        warmup_epochs: of linear growth.
        warmup_factor: of the first epoch's rate.

    Raises:
        ValueError: the warm-up is not shorter than the run.
    """

    def __init__(
        self, optimizer: Optimizer, epochs: int = 60, warmup_epochs: int = 5, warmup_factor: float = 0.1
    ) -> None:
        check(
            0 <= warmup_epochs < epochs, "warmup_epochs", warmup_epochs, f"in [0, {epochs}), the run's epochs"
        )
        self.epochs = epochs
        super().__init__(optimizer, lambda epoch: rate_factor(epoch, epochs, warmup_epochs, warmup_factor))


def rate_factor(epoch: int, epochs: int, warmup_epochs: int = 5, warmup_factor: float = 0.1) -> float:
    """What the base rate is multiplied with in epoch 0, 1, ... of `epochs`."""
    if epoch < warmup_epochs:
        grown = epoch / warmup_epochs
        return warmup_factor * (1 - grown) + grown
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))))
