"""What decides a cross-block quantization, and how far it has got."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.rounding import RoundingInit
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.windows import sliding_windows
from lightning_modules.parts.options import check, check_range

_RANGES = {
    "epochs": "[0, inf)",
    "batch_size": "[1, inf)",
    "hard_start": "[0, 1]",
    "beta_warmup": "[0, 1)",
    "skip_first_tokens": "[0, inf)",
    "cfp_min_gap": "[0, inf)",
    "lr_rounding": "[0, inf)",
    "lr_weight_step": "[0, inf)",
    "lr_act_step": "[0, inf)",
    "held_out": "[0, 1)",
    "patience": "[0, inf)",
}


@dataclass(frozen=True)
class CrossBlockSettings:
    """Everything that decides CBQ's integers besides the schemes of the layers.

    Args:
        window: blocks that are optimised together.
        overlap: blocks that neighbouring windows share; they go on where the last window left them.
        epochs: passes over the calibration segments for each window; 0 is RTN (after CFP).
        batch_size: segments of a step, on each device.
        rounding_form: `sigmoid` is the paper's rectified sigmoid on the floor of the first grid; `offset`
            learns an offset of at most half a step before rounding and both ends of each group's range, and
            recomputes the integers (AutoRound's parameters; `rounding_rank` full, or 0: the ranges alone).
        rounding_rank: of A1 @ A2; 0 learns no rounding, `full` gives each weight its own V.
        rounding_init: `fraction` starts from the weights as they are, `zero` is the paper's literal text.
        hard_start: share of a window's steps after which the forward pass rounds; 0 from the first, 1 never.
        lambda_com: weight of the penalty that drives soft rounding to 0 or 1 (the paper's L_com).
        beta_start: its exponent in the first steps.
        beta_end: its exponent at the end.
        beta_warmup: share of the steps before the exponent falls.
        learn_steps: train the weights' step sizes.
        optimizer: `sign_sgd` moves everything by its rate, in the direction of the gradient's sign.
        rate_decay: of all rates to zero over the steps of a window.
        rates_per_window: rates are divided by the steps of a window, so that with linear decay and `sign_sgd`
            a parameter can travel half of its rate, however few the steps are.
        lr_rounding: rate of the rounding; published 1e-4.
        lr_weight_step: of the step sizes of weights, or of their ranges' ends; published 1e-7.
        lr_act_step: of static step sizes of activations; published 1e-6.
        held_out: share of the segments (rounded up) that no step sees: after each pass the window's loss on
            them is measured, and the state with the lowest is kept.
        patience: passes without a lower held-out error after which a window ends; 0 does all.
        loss_l2: squared error in the loss.
        loss_kl: divergence in the loss.
        homologous: second target, from the quantized prefix through full-precision blocks.
        skip_first_tokens: tokens at the start of each segment that the loss leaves out.
        cfp_weights: truncate outlier weights before the grid is fitted.
        cfp_activations: scale outlier channels, exactly undone in the layer before; None: only where
            activations are quantized.
        cfp_coarse_factor: lambda1, interquartile ranges above the third quartile.
        cfp_variance_weight: lambda2, of the reserved part's variance.
        cfp_min_gap: smallest gap of a split, in interquartile ranges; 0 is the literal rule.
        cfp_granularity: a weight threshold for each matrix, or each of its rows.
        cfp_variant: the paper's square root, or the vendor's two-sided rule.
        seed: of A1 and of the order of the segments.

    Raises:
        OptionError: an option is out of its range.
    """

    window: int = 2
    overlap: int = 1
    epochs: int = 3
    batch_size: int = 1
    rounding_form: Literal["sigmoid", "offset"] = "sigmoid"
    rounding_rank: int | Literal["full"] = 5
    rounding_init: RoundingInit = "fraction"
    hard_start: float = 0.0
    lambda_com: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    beta_warmup: float = 0.2
    learn_steps: bool = True
    optimizer: Literal["adam", "sign_sgd"] = "adam"
    rate_decay: Literal["cosine", "linear"] = "cosine"
    rates_per_window: bool = False
    lr_rounding: float = 1e-2
    lr_weight_step: float = 1e-3
    lr_act_step: float = 1e-4
    held_out: float = 0.0
    patience: int = 0
    loss_l2: bool = True
    loss_kl: bool = True
    homologous: bool = True
    skip_first_tokens: int = 0
    cfp_weights: bool = True
    cfp_activations: bool | None = None
    cfp_coarse_factor: float = 1.5
    cfp_variance_weight: float = 1.0
    cfp_min_gap: float = 0.1
    cfp_granularity: Literal["tensor", "channel"] = "tensor"
    cfp_variant: Literal["paper", "two_sided"] = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        sliding_windows(1, self.window, self.overlap)
        for option, interval in _RANGES.items():
            check_range(option, getattr(self, option), interval)
        if self.rounding_rank != "full":
            check_range("rounding_rank", self.rounding_rank, "[0, inf)")
        if self.rounding_form == "offset":
            rank, start = self.rounding_rank, self.hard_start
            check(rank in ("full", 0), "rounding_rank", rank, "full or 0 where rounding_form is offset")
            check(start == 0, "hard_start", start, "0 where rounding_form is offset, which always rounds")
        check(not self.patience or self.held_out > 0, "patience", self.patience, "0 where held_out is 0")
        check(self.loss_l2 or self.loss_kl, "loss_kl", self.loss_kl, "true where loss_l2 is false")

    def learned_segments(self, segments: int) -> int:
        """How many of a device's segments the steps see: those before the held-out ones.

        Raises:
            OptionError: none is left.
        """
        learned = segments - math.ceil(self.held_out * segments)
        check(learned > 0, "held_out", self.held_out, f"0 with {segments} calibration segment(s) on a device")
        return learned

    def resolved(self, schemes: Iterable[Scheme]) -> "CrossBlockSettings":
        """The same with `cfp_activations` decided for the layers that are quantized."""
        if self.cfp_activations is not None:
            return self
        return replace(self, cfp_activations=any(scheme.activation_bits < 16 for scheme in schemes))


@dataclass
class Progress:
    """What is known after some windows; enough to go on from there.

    Attributes:
        windows: how many are done.
        matrices: final integers by layer name.
        learned: state of the layers that the next window goes on with.
        scales: CFP's channel scales, by `block/fold`.
        thresholds: CFP's weight thresholds that cut something, by layer: tau and how many weights.
        rows: the report of each window.
    """

    windows: int = 0
    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)
    learned: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
