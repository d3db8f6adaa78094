"""Post-training quantization of vision networks: `HessianPTQ`, and the pieces that it is made of."""

from callbacks.quantization.vision.callback import HessianPTQ
from callbacks.quantization.vision.report import effective_macs
from callbacks.quantization.vision.settings import PTQSettings

__all__ = ["HessianPTQ", "PTQSettings", "effective_macs"]
