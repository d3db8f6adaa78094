"""RTN: every weight to the nearest grid point. What any other method must beat; needs no data."""

from typing import Any

from lightning.pytorch import Trainer
from torch.utils.hooks import RemovableHandle

from callbacks.quantization.base import QuantizationCallback
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.sequential import nearest_matrix
from lightning_modules.language_model import CausalLanguageModel


class RTN(QuantizationCallback):
    """Round-to-nearest, see `QuantizationCallback` for when and what.

    Args:
        options: of `Scheme` and of `QuantizationCallback`.
    """

    name = "rtn"
    needs_inputs = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def quantize(
        self, trainer: Trainer, module: CausalLanguageModel, blocks: str, schemes: dict[str, Scheme]
    ) -> tuple[dict[str, QuantizedMatrix], list[RemovableHandle], dict[str, Any]]:
        """Round every layer."""
        layers = {name: module.network.get_submodule(name) for name in schemes}
        matrices = {name: nearest_matrix(layers[name], scheme) for name, scheme in schemes.items()}
        handles = [matrix.install(layers[name]) for name, matrix in matrices.items()]
        return matrices, [handle for handle in handles if handle is not None], {}
