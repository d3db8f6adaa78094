"""DECO+'s moving average of the weights, for Lightning's `WeightAveraging`."""

import math

from torch import Tensor


def ramped_decay(update: int, decay: float = 0.9999, ramp: float = 2000.0) -> float:
    """d(u) = decay * (1 - exp(-u / ramp)): what the average keeps of itself in update u, counted from 1."""
    return decay * (1 - math.exp(-update / ramp))


def ramped_average(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
    """The average after one more update, `a + (1 - d(u)) (w - a)`.

    To be given to `lightning.pytorch.callbacks.WeightAveraging` as `avg_fn`, with `use_buffers: true`. torch
    takes the first update whole, where the authors keep d(1), or 0.05 %, of the initial weights.

    Args:
        averaged: a.
        current: w.
        num_averaged: updates before this one.
    """
    return averaged + (1 - ramped_decay(int(num_averaged) + 1)) * (current - averaged)
