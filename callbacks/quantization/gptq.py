"""GPTQ as a callback: error feedback from column to column, block after block."""

import time
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.hooks import RemovableHandle

from callbacks.quantization.base import QuantizationCallback, network_device
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.ranks import share_of
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.sequential import SequentialGPTQ
from lightning_modules.language_model import CausalLanguageModel
from lightning_modules.parts.options import check, check_range


class GPTQ(QuantizationCallback):
    """GPTQ (Frantar et al., ICLR 2023), see `QuantizationCallback` for when and what.

    Args:
        damp: share of the mean diagonal of the Hessian that is added to it; several are candidates, see
            `SequentialGPTQ`.
        batch_size: calibration segments that pass through a block at once.
        true_sequential: see `SequentialGPTQ`.
        act_order: columns by falling size of their inputs, in static groups; False: left to right, as it was
            published first.
        options: of `Scheme` and of `QuantizationCallback`.
    """

    name = "gptq"

    def __init__(
        self,
        damp: float | list[float] = 0.01,
        batch_size: int = 1,
        true_sequential: bool = True,
        act_order: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check(damp != [], "damp", damp, "a number or some candidates")
        for candidate in damp if isinstance(damp, list) else [damp]:
            check_range("damp", candidate, "(0, inf)")
        check_range("batch_size", batch_size, "[1, inf)")
        self.damp = damp
        self.batch_size = batch_size
        self.true_sequential = true_sequential
        self.act_order = act_order

    def quantize(
        self, trainer: Trainer, module: CausalLanguageModel, blocks: str, schemes: dict[str, Scheme]
    ) -> tuple[dict[str, QuantizedMatrix], list[RemovableHandle], dict[str, Any]]:
        """Calibrate block after block."""
        began = time.perf_counter()
        segments = self.segments(trainer)
        engine = SequentialGPTQ(
            module.network,
            blocks,
            schemes,
            share_of(segments),
            damp=self.damp,
            batch_size=self.batch_size,
            device=network_device(module.network),
            true_sequential=self.true_sequential,
            act_order=self.act_order,
        )
        matrices = engine.run()
        report = {
            "calibration_segments": len(segments),
            "calibration_tokens": segments.numel(),
            "calibration_seconds": time.perf_counter() - began,
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in engine.rows),
            "blocks": engine.rows,
        }
        return matrices, engine.handles, report
