"""CBQ as a callback: cross-block reconstruction before the model is evaluated."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.hooks import RemovableHandle

from callbacks.quantization.base import QuantizationCallback, network_device
from callbacks.quantization.cross_block import CrossBlock
from callbacks.quantization.layers import QuantizedMatrix, matrix_of
from callbacks.quantization.ranks import rank_and_world, share_of
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.settings import CrossBlockSettings, Progress
from callbacks.quantization.store import ProgressFile, fingerprint
from callbacks.quantization.windows import sliding_windows
from callbacks.run.directory import announce, run_directory
from lightning_modules.language_model import CausalLanguageModel
from lightning_modules.parts.options import options_of


class CBQ(QuantizationCallback):
    """Cross-block quantization (arXiv 2312.07950), see `QuantizationCallback` for when and what.

    Each part is a switch: `cfp_weights` and `cfp_activations`, `rounding_rank` (0: none, `full`: AdaRound),
    `window` and `overlap`, `homologous`, `learn_steps`, and the terms of the loss. After each window the
    progress is in `<run>/<name>_progress.pt`; a run that was killed goes on from there, and a finished one is
    loaded instead of repeated (`validate`, then `test`, then `predict` calibrate once).

    Args:
        resume: go on from, or load, what the run directory holds.
        cache_dir: hidden states in memory-mapped files in this folder instead of memory.
        cache_dtype: of the hidden states.
        offload: blocks outside the window wait in the CPU's memory, so that a large model needs a small GPU.
        options: of `CrossBlockSettings` and of `QuantizationCallback`.

    Raises:
        OptionError: `window`, `overlap`, `rounding_rank` or another option is out of its range.
        RuntimeError: a loss is not finite; names window, step and rates.
    """

    name = "cbq"
    takes_encoders = False

    @options_of(CrossBlockSettings)
    def __init__(
        self,
        *,
        settings: CrossBlockSettings,
        resume: bool = True,
        cache_dir: Path | None = None,
        cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        offload: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.settings = settings
        self.resume = resume
        self.offload = offload
        self.cache_dir = cache_dir
        self.cache_dtype: torch.dtype = getattr(torch, cache_dtype)

    def check(self, schemes: Any) -> None:
        """Static activation steps are learned here."""

    def quantize(
        self, trainer: Trainer, module: CausalLanguageModel, blocks: str, schemes: dict[str, Scheme]
    ) -> tuple[dict[str, QuantizedMatrix], list[RemovableHandle], dict[str, Any]]:
        """Reconstruct window after window, or load what was reconstructed."""
        began = time.perf_counter()
        segments = self.segments(trainer)
        share = share_of(segments)
        used = [int(name.removeprefix(f"{blocks}.").split(".")[0]) for name in schemes]
        windows = sliding_windows(max(used) + 1, self.settings.window, self.settings.overlap)
        file = self._progress_file(trainer, module, schemes, segments)
        progress = file.load() if self.resume else None
        resumed = progress.windows if progress else 0

        def keep(progress: Progress) -> None:
            if trainer.is_global_zero:
                file.save(progress)
            row = progress.rows[-1]
            losses = (
                f", loss {row['loss_before']:.4g} to {row['loss_after']:.4g}" if "loss_after" in row else ""
            )
            announce(trainer, f"window {progress.windows}/{len(windows)}{losses}, {row['seconds']:.1f} s")

        precision = str(trainer.precision)
        if "16" in precision and "bf16" not in precision:
            raise MisconfigurationException(
                f"trainer.precision is {precision}: CBQ's losses overflow in float16. Use 32-true or "
                "bf16-mixed."
            )
        engine = CrossBlock(
            module.network,
            *(blocks, windows, schemes, share, self.settings),
            device=network_device(module.network),
            cache_directory=self.cache_dir,
            cache_dtype=self.cache_dtype,
            progress=progress,
            on_window=keep,
            autocast=torch.bfloat16 if precision == "bf16-mixed" else None,
            offload=self.offload,
        )
        done = engine.run()
        report = {
            **self._report(done, windows, segments),
            "windows_loaded": resumed,
            "calibration_seconds": sum(row["seconds"] for row in done.rows),
            "this_run_seconds": time.perf_counter() - began,
        }
        return done.matrices, engine.handles, report

    def _progress_file(
        self,
        trainer: Trainer,
        module: CausalLanguageModel,
        schemes: dict[str, Scheme],
        segments: torch.Tensor,
    ) -> ProgressFile:
        identity = asdict(self.settings.resolved(schemes.values())) | fingerprint(module.network, segments)
        identity |= {"schemes": {name: asdict(scheme) for name, scheme in schemes.items()}}
        identity |= {"ranks": rank_and_world()[1], "precision": str(trainer.precision)}
        identity |= {"cache_dtype": str(self.cache_dtype)}
        shapes = {name: tuple(matrix_of(module.network.get_submodule(name)).shape) for name in schemes}
        return ProgressFile(run_directory(trainer) / f"{self.name}_progress.pt", identity, shapes)

    def _report(
        self, done: Progress, windows: list[tuple[int, int]], segments: torch.Tensor
    ) -> dict[str, Any]:
        """The method's part of the report."""
        settings = self.settings
        return {
            "window": settings.window,
            "overlap": settings.overlap,
            "rounding_rank": settings.rounding_rank,
            "homologous": settings.homologous,
            "windows_optimised": len(windows),
            "calibration_segments": len(segments),
            "calibration_tokens": segments.numel(),
            "truncated_weights": int(sum(entry["weights"] for entry in done.thresholds.values())),
            "scaled_channels": int(sum((scales != 1).sum().item() for scales in done.scales.values())),
            "peak_memory_bytes": max((row["peak_memory_bytes"] for row in done.rows), default=0),
            "windows": done.rows,
            "blocks": {
                "truncated": done.thresholds,
                "scaled": {
                    key: {"channels": int((scales != 1).sum()), "largest": float(scales.amax())}
                    for key, scales in done.scales.items()
                },
            },
        }
