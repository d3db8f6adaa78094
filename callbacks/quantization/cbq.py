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
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.ranks import rank_and_world, share_of
from callbacks.quantization.rounding import RoundingInit
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.settings import CrossBlockSettings, Progress
from callbacks.quantization.store import ProgressFile, fingerprint
from callbacks.quantization.windows import sliding_windows
from callbacks.run.directory import announce, run_directory
from lightning_modules.language_model import CausalLanguageModel

Rank = int | Literal["full"]


class CBQ(QuantizationCallback):
    """Cross-block quantization (arXiv 2312.07950), see `QuantizationCallback` for when and what.

    Each part is a switch: `cfp_weights` and `cfp_activations`, `rounding_rank` (0: none, `full`: AdaRound),
    `window` and `overlap`, `homologous`, `learn_steps`, and the terms of the loss. After each window the
    progress is in `<run>/<name>_progress.pt`; a run that was killed goes on from there, and a finished one is
    loaded instead of repeated (`validate`, then `test`, then `predict` calibrate once).

    Args:
        window: blocks that are optimised together.
        overlap: blocks that neighbouring windows share; they go on where the last window left them.
        epochs: passes over the calibration segments for each window; 0 is RTN (after CFP).
        batch_size: segments of a step, on each device.
        rounding_rank: of A1 @ A2; 0 learns no rounding, `full` gives each weight its own V.
        rounding_init: `fraction` starts from the weights as they are, `zero` is the paper's literal text.
        hard_start: share of a window's steps after which the forward pass rounds; 0 from the first, 1 never.
        lambda_com: weight of the penalty that drives soft rounding to 0 or 1 (the paper's L_com).
        beta_start: its exponent in the first steps.
        beta_end: its exponent at the end.
        beta_warmup: share of the steps before the exponent falls.
        learn_steps: train the weights' step sizes.
        lr_rounding: Adam's rate for the rounding; published 1e-4.
        lr_weight_step: for the step sizes of weights; published 1e-7.
        lr_act_step: for static step sizes of activations; published 1e-6.
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
        resume: go on from, or load, what the run directory holds.
        cache_dir: hidden states in memory-mapped files in this folder instead of memory.
        cache_dtype: of the hidden states.
        offload: blocks outside the window wait in the CPU's memory, so that a large model needs a small GPU.
        options: of `QuantizationCallback`.

    Raises:
        ValueError: `window`, `overlap`, `rounding_rank` or another option is out of its range.
        RuntimeError: a loss is not finite; names window, step and rates.
    """

    name = "cbq"

    def __init__(
        self,
        window: int = 2,
        overlap: int = 1,
        epochs: int = 3,
        batch_size: int = 1,
        rounding_rank: Rank = 5,
        rounding_init: RoundingInit = "fraction",
        hard_start: float = 0.0,
        lambda_com: float = 0.01,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
        beta_warmup: float = 0.2,
        learn_steps: bool = True,
        lr_rounding: float = 1e-2,
        lr_weight_step: float = 1e-3,
        lr_act_step: float = 1e-4,
        loss_l2: bool = True,
        loss_kl: bool = True,
        homologous: bool = True,
        skip_first_tokens: int = 0,
        cfp_weights: bool = True,
        cfp_activations: bool | None = None,
        cfp_coarse_factor: float = 1.5,
        cfp_variance_weight: float = 1.0,
        cfp_min_gap: float = 0.1,
        cfp_granularity: Literal["tensor", "channel"] = "tensor",
        cfp_variant: Literal["paper", "two_sided"] = "paper",
        seed: int = 0,
        resume: bool = True,
        cache_dir: Path | None = None,
        cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        offload: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if cfp_activations is None:
            per_layer = [layer.get("activation_bits", 16) for layer in self.overrides.values()]
            cfp_activations = min([self.scheme.activation_bits, *per_layer]) < 16
        self.settings = CrossBlockSettings(
            window=window,
            overlap=overlap,
            epochs=epochs,
            batch_size=batch_size,
            rounding_rank=rounding_rank,
            rounding_init=rounding_init,
            hard_start=hard_start,
            lambda_com=lambda_com,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_warmup=beta_warmup,
            learn_steps=learn_steps,
            lr_rounding=lr_rounding,
            lr_weight_step=lr_weight_step,
            lr_act_step=lr_act_step,
            loss_l2=loss_l2,
            loss_kl=loss_kl,
            homologous=homologous,
            skip_first_tokens=skip_first_tokens,
            cfp_weights=cfp_weights,
            cfp_activations=cfp_activations,
            cfp_coarse_factor=cfp_coarse_factor,
            cfp_variance_weight=cfp_variance_weight,
            cfp_min_gap=cfp_min_gap,
            cfp_granularity=cfp_granularity,
            cfp_variant=cfp_variant,
            seed=seed,
        )
        self.settings.validate()
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
        found = self._found(done, windows, schemes, len(segments), segments.numel())
        return (
            done.matrices,
            engine.handles,
            {
                **found,
                "windows_loaded": resumed,
                "calibration_seconds": sum(row["seconds"] for row in done.rows),
                "this_run_seconds": time.perf_counter() - began,
            },
        )

    def _progress_file(
        self,
        trainer: Trainer,
        module: CausalLanguageModel,
        schemes: dict[str, Scheme],
        segments: torch.Tensor,
    ) -> ProgressFile:
        identity = asdict(self.settings) | fingerprint(module.network, segments)
        identity |= {"schemes": {name: asdict(scheme) for name, scheme in schemes.items()}}
        identity |= {"ranks": rank_and_world()[1], "precision": str(trainer.precision)}
        identity |= {"cache_dtype": str(self.cache_dtype)}
        return ProgressFile(run_directory(trainer) / f"{self.name}_progress.pt", identity)

    def _found(
        self,
        done: Progress,
        windows: list[tuple[int, int]],
        schemes: dict[str, Scheme],
        count: int,
        tokens: int,
    ) -> dict[str, Any]:
        """The method's part of the report."""
        settings = self.settings
        return {
            "window": settings.window,
            "overlap": settings.overlap,
            "rounding_rank": settings.rounding_rank,
            "homologous": settings.homologous,
            "windows_optimised": len(windows),
            "calibration_segments": count,
            "calibration_tokens": tokens,
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
