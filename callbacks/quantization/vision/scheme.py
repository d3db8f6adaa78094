"""What of a vision network is quantized how."""

from dataclasses import dataclass

from lightning_modules.parts.options import check

OFF = (16, 32)


@dataclass(frozen=True)
class VisionScheme:
    """How one layer or product of a vision network is quantized.

    Args:
        bits: of a layer's weight, 2..8; 16 or 32 leave it alone.
        activation_bits: of a layer's input and of both operands of attention's products, 2..8; 16 or 32 leave
            them alone.
    """

    bits: int = 8
    activation_bits: int = 8

    def __post_init__(self) -> None:
        for option in ("bits", "activation_bits"):
            value = getattr(self, option)
            check(2 <= value <= 8 or value in OFF, option, value, "2..8, or 16 or 32 to leave it alone")

    def __str__(self) -> str:
        return f"W{self.bits}A{self.activation_bits}"

    @property
    def active(self) -> bool:
        """Whether anything is quantized at all."""
        return self.bits < 16 or self.activation_bits < 16
