"""Post-training quantization: RTN, GPTQ and CBQ of language models, HessianPTQ of vision networks."""

from callbacks.deploy.compressed_tensors import export_model
from callbacks.quantization.base import QuantizationCallback
from callbacks.quantization.cbq import CBQ
from callbacks.quantization.cross_block import CrossBlock
from callbacks.quantization.gptq import GPTQ
from callbacks.quantization.rtn import RTN
from callbacks.quantization.scheme import Scheme, resolve_schemes
from callbacks.quantization.sequential import SequentialGPTQ
from callbacks.quantization.settings import CrossBlockSettings
from callbacks.quantization.vision import HessianPTQ, PTQSettings

__all__ = [
    "CBQ",
    "GPTQ",
    "RTN",
    "CrossBlock",
    "CrossBlockSettings",
    "HessianPTQ",
    "PTQSettings",
    "QuantizationCallback",
    "Scheme",
    "SequentialGPTQ",
    "export_model",
    "resolve_schemes",
]
