"""What decides a cross-block quantization, and how far it has got."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.rounding import RoundingInit
from callbacks.quantization.windows import sliding_windows


@dataclass(frozen=True)
class CrossBlockSettings:
    """Everything that decides the integers, see `CBQ` for what each means."""

    window: int = 2
    overlap: int = 1
    epochs: int = 3
    batch_size: int = 1
    rounding_rank: int | Literal["full"] = 5
    rounding_init: RoundingInit = "fraction"
    hard_start: float = 0.0
    lambda_com: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    beta_warmup: float = 0.2
    learn_steps: bool = True
    lr_rounding: float = 1e-2
    lr_weight_step: float = 1e-3
    lr_act_step: float = 1e-4
    loss_l2: bool = True
    loss_kl: bool = True
    homologous: bool = True
    skip_first_tokens: int = 0
    cfp_weights: bool = True
    cfp_activations: bool = True
    cfp_coarse_factor: float = 1.5
    cfp_variance_weight: float = 1.0
    cfp_min_gap: float = 0.1
    cfp_granularity: Literal["tensor", "channel"] = "tensor"
    cfp_variant: Literal["paper", "two_sided"] = "paper"
    seed: int = 0

    def validate(self) -> None:
        """Refuse what is out of range.

        Raises:
            ValueError: names the option.
        """
        sliding_windows(1, self.window, self.overlap)
        ranges = {
            "epochs": self.epochs >= 0,
            "batch_size": self.batch_size >= 1,
            "rounding_rank": self.rounding_rank == "full" or int(self.rounding_rank) >= 0,
            "hard_start": 0 <= self.hard_start <= 1,
            "beta_warmup": 0 <= self.beta_warmup < 1,
            "skip_first_tokens": self.skip_first_tokens >= 0,
            "cfp_min_gap": self.cfp_min_gap >= 0,
            "loss_l2 and loss_kl": self.loss_l2 or self.loss_kl,
            "learning rates": min(self.lr_rounding, self.lr_weight_step, self.lr_act_step) >= 0,
        }
        wrong = [option for option, fine in ranges.items() if not fine]
        if wrong:
            raise ValueError(f"CBQ: {', '.join(wrong)} is out of range.")


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
