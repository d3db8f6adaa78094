"""CFP, coarse-to-fine pre-processing: which weights and channels are outliers, and by how much they shrink.

Spec 2.6 to 2.8, and the vendor's two-sided variant of section 6.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detection:
    """What the detector found in an array.

    Attributes:
        coarse_threshold: T, the third quartile plus lambda1 interquartile ranges.
        coarse: how many values lie above T.
        threshold: tau; outliers are the values above it.
        outliers: how many there are.
        split: i*, the index in the coarse set where the outliers begin; None where there is none.
        merit: M(i*), squared gap minus lambda2 times the variance of the reserved part.
    """

    coarse_threshold: float
    coarse: int
    threshold: float
    outliers: int
    split: int | None = None
    merit: float | None = None


def detect_outliers(
    values: Tensor, coarse_factor: float = 1.5, variance_weight: float = 1.0, min_gap: float = 0.1
) -> Detection:
    """Quartile rule, then the split of the coarse set with the largest set distance (spec 2.6).

    Args:
        values: non-negative, any shape; absolute weights, or one number for each channel.
        coarse_factor: lambda1.
        variance_weight: lambda2.
        min_gap: a split needs a gap of so many interquartile ranges; 0 is the paper's literal rule, which
            collapses on real weights.

    Raises:
        ValueError: `values` is empty, negative or not finite.
    """
    flat = values.detach().flatten()
    if not len(flat):
        raise ValueError("CFP: there are no values to find outliers in.")
    smallest, largest = float(flat.amin()), float(flat.amax())
    if not smallest >= 0 or largest == float("inf"):
        raise ValueError(f"CFP needs finite values of at least 0, got {smallest}..{largest}.")
    # torch.quantile refuses 2^24 values and more; kthvalue does not sort
    lower = float(flat.kthvalue(len(flat) // 4 + 1).values)
    upper = float(flat.kthvalue(3 * len(flat) // 4 + 1).values)
    spread = upper - lower
    bound = upper + coarse_factor * spread
    coarse = flat[flat.double() > bound].double().sort().values  # ascending o_0 .. o_{N-1}
    if not len(coarse):
        return Detection(bound, 0, largest, 0)
    below = float(flat[flat.double() <= bound].amax())
    reserved = torch.cat([coarse.new_tensor([below]), coarse[:-1]])  # r_i
    gaps = coarse - reserved
    merit = gaps.square() - variance_weight * _prefix_variances(coarse)
    merit[gaps < min_gap * spread] = -torch.inf
    best = float(merit.amax())
    if best == -torch.inf:
        return Detection(bound, len(coarse), largest, 0)
    split = int((merit == best).nonzero()[-1])  # ties keep the smaller outlier set
    return Detection(bound, len(coarse), float(reserved[split]), len(coarse) - split, split, best)


def _prefix_variances(ordered: Tensor) -> Tensor:
    """Unbiased variance of the first i values for i = 0 .. N-1; 0 below two values. float64."""
    shifted = ordered - ordered[0]
    count = torch.arange(len(ordered), dtype=ordered.dtype, device=ordered.device)
    zero = shifted.new_zeros(1)
    total = torch.cat([zero, shifted.cumsum(0)])[:-1]
    squares = torch.cat([zero, shifted.square().cumsum(0)])[:-1]
    variances = (squares - total.square() / count.clamp_min(1)) / (count - 1).clamp_min(1)
    return torch.where(count < 2, 0.0, variances.clamp_min(0))


def channel_scales(maxima: Tensor, min_gap: float = 0.1, **options: float) -> tuple[Tensor, Detection]:
    """s_c = sqrt(m_c / tau) for outlier channels, 1 for the others (spec 2.8).

    Args:
        maxima: (channels,), the largest magnitude of each channel over the calibration tokens.
        min_gap: see `detect_outliers`.
        options: further options of `detect_outliers`.
    """
    detection = detect_outliers(maxima, min_gap=min_gap, **options)
    if not detection.outliers or detection.threshold <= 0:
        return torch.ones_like(maxima), detection
    return (maxima / detection.threshold).sqrt().clamp_min(1), detection


def two_sided_scales(maxima: Tensor, minima: Tensor, alpha: float = 1.5, power: float = 0.7) -> Tensor:
    """The vendor's variant: signed sides, quantiles 0.2 and 0.8, plain gaps, power 0.7 (spec section 6).

    Args:
        maxima: (channels,) largest value of each channel.
        minima: (channels,) smallest value of each channel.
        alpha: range factor of its coarse step.
        power: of the ratio to the largest kept value.

    Raises:
        ValueError: a side is empty.
    """
    scales = torch.ones_like(maxima)
    for side in (maxima.clamp_min(0), (-minima).clamp_min(0)):
        if not len(side):
            raise ValueError("CFP: there are no channels to find outliers in.")
        threshold = _vendor_threshold(side, alpha)
        if threshold > 0:
            outliers = torch.where(side > threshold, (side / threshold) ** power, 1.0)
            scales = torch.maximum(scales, outliers)
    return scales


def _vendor_threshold(side: Tensor, alpha: float) -> float:
    """Largest kept value of one side."""
    ordered = side.double().sort().values
    lower, upper = (float(torch.quantile(ordered, q)) for q in (0.2, 0.8))
    bound = upper + alpha * (upper - lower)
    coarse = ordered[ordered > bound]
    best, threshold = -1000.0, float(ordered[ordered <= bound][-1])
    for split in range(1, len(coarse)):
        reserved = coarse[:split]
        variance = float(reserved.var()) if split > 1 else 0.0
        merit = float(coarse[split] - reserved[-1]) - variance
        if merit > best:
            best, threshold = merit, float(reserved[-1])
    return threshold


def truncated(weight: Tensor, threshold: float | Tensor) -> Tensor:
    """W clamped to [-tau, tau]; tau is a number, or (d_out, 1) for each row."""
    if isinstance(threshold, Tensor):
        return torch.maximum(torch.minimum(weight, threshold), -threshold)
    return weight.clamp(-threshold, threshold)
