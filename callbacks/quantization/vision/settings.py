"""What decides the quantization of a vision network."""

from dataclasses import dataclass
from typing import Literal

from callbacks.quantization.scheme import VisionScheme
from callbacks.quantization.vision.layers import SearchOptions
from callbacks.quantization.vision.losses import GradSource
from callbacks.quantization.vision.operands import SoftmaxQuant
from lightning_modules.parts.options import OptionError, check_choice, check_range

Search = Literal["grid", "minmax"]


@dataclass(frozen=True)
class PTQSettings(VisionScheme):
    """Everything that decides the steps.

    Args:
        bits: of the weights of linear layers and convolutions, 2..8; 16 or 32 leave them alone.
        activation_bits: of layers' inputs and of both operands of attention's products, 2..8; 16 or 32 leave
            them alone.
        search: `grid` looks for the step of every operand, `minmax` covers the largest value.
        grad_source: of the squared gradients that weigh the error of a layer's output: `fisher` draws from
            the network's own outputs, `sequential_kl` takes the divergence from full precision with all
            layers before this one quantized (one backward pass a layer), `none` weighs all alike (L2).
        softmax_quant: of probabilities: two ranges that meet at a split, the literal sum of the released
            code, or one range.
        gelu_quant: of a linear layer's input behind a GELU: two ranges, or one.
        theta_low: candidate i is the min-max step times theta_low + i (theta_high - theta_low) / candidates.
        theta_high: see `theta_low`.
        candidates: steps that are tried.
        rounds: of the search of both operands in turn.
        calibration_images: training images that are looked at.
        seed: of the draws of `fisher`.

    Raises:
        OptionError: an option is out of its range.
    """

    search: Search = "grid"
    grad_source: GradSource = "fisher"
    softmax_quant: SoftmaxQuant = "disjoint"
    gelu_quant: Literal["two_range", "uniform"] = "two_range"
    theta_low: float = 0.01
    theta_high: float = 1.2
    candidates: int = 100
    rounds: int = 3
    calibration_images: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, choices in (
            ("search", Search),
            ("grad_source", GradSource),
            ("softmax_quant", SoftmaxQuant),
            ("gelu_quant", Literal["two_range", "uniform"]),
        ):
            check_choice(option, getattr(self, option), choices)
        check_range("theta_low", self.theta_low, "(0, inf)")
        for option in ("candidates", "rounds", "calibration_images"):
            check_range(option, getattr(self, option), "[1, inf)")
        if not self.theta_high > self.theta_low:
            raise OptionError(f"theta_high={self.theta_high}: it must be above theta_low={self.theta_low}.")

    @property
    def scheme(self) -> VisionScheme:
        """The bits alone."""
        return VisionScheme(self.bits, self.activation_bits)

    @property
    def options(self) -> SearchOptions:
        """Those of the search alone."""
        return SearchOptions(self.theta_low, self.theta_high, self.candidates, self.rounds)

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration has backward passes."""
        return self.search == "grid" and self.grad_source != "none"
