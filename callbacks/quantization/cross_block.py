"""CBQ's engine: windows of blocks are reconstructed together, one window after another (spec 2.4, 2.9).

Plain torch: `CrossBlock(network, schemes, segments, settings).run()` leaves the network quantized.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.measure.memory import PeakMemory
from callbacks.quantization.activations import ActivationQuantizer
from callbacks.quantization.blocks import BlockStack
from callbacks.quantization.branches import Branches
from callbacks.quantization.folding import ChannelRange
from callbacks.quantization.layers import LearnedLayer, matrix_of, replace_module
from callbacks.quantization.offsets import LearnedOffset
from callbacks.quantization.preprocessing import ChannelScaling, truncate_outliers
from callbacks.quantization.ranks import maximum
from callbacks.quantization.reconstruction import Reconstruction
from callbacks.quantization.rounding import LearnedRounding
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.settings import CrossBlockSettings, Progress
from lightning_modules.parts.reproducibility import derived_seed


class CrossBlock:
    """Reconstructs window after window.

    Args:
        network: causal language model; changed in place.
        blocks: path of its blocks.
        windows: `[start, end)` of each window.
        schemes: `{layer name: scheme}`.
        segments: this rank's token ids, (segments, length), all of one length.
        settings: see `CrossBlockSettings`.
        device: where a window is optimised.
        cache_directory: keeps the hidden states in memory-mapped files there; None is memory.
        cache_dtype: of the hidden states.
        progress: go on from here.
        on_window: called with the progress after each window.
        report_segments: segments on which loss and error of a window are measured before and after.
        autocast: type of the matrix products (bfloat16); the quantizers stay in float32.
        offload: blocks outside the window wait in the CPU's memory.

    Raises:
        OptionError: no segment is left besides the held-out ones.
        RuntimeError: a loss is not finite; names window, step and learning rates.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: str,
        windows: list[tuple[int, int]],
        schemes: dict[str, Scheme],
        segments: Tensor,
        settings: CrossBlockSettings,
        device: torch.device | None = None,
        cache_directory: Path | None = None,
        cache_dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        on_window: Callable[[Progress], None] | None = None,
        report_segments: int = 4,
        autocast: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        self.network = network
        self.windows = windows
        self.schemes = schemes
        self.segments = segments
        self.settings = settings = settings.resolved(schemes.values())
        settings.learned_segments(len(segments))
        self.device = device or torch.device("cpu")
        self.stack = BlockStack(network, blocks, segments, self.device, autocast, offload)
        self.branches = Branches(
            self.stack, segments, settings.batch_size, settings.homologous, cache_dtype, cache_directory
        )
        self.progress = progress or Progress()
        self.on_window = on_window
        self.report_segments = min(report_segments, len(segments))
        self._learned: dict[str, LearnedLayer] = {}
        self.handles: list[RemovableHandle] = []  # of the activation quantizers that stay

    def run(self) -> Progress:
        """Quantize every block; the network ends with hard weights."""
        self.network.eval()
        frozen = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            self._scale_channels()
            if self._looks_at_data() and self.progress.windows < len(self.windows):
                self.branches.fill()
            for index in range(self.progress.windows, len(self.windows)):
                self._window(index)
            self._leave_behind(self.windows[-1][1])
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self.stack.keep(0, len(self.stack))
        self.branches.clear()
        return self.progress

    def _looks_at_data(self) -> bool:
        """Whether hidden states are needed: for the loss, or for the first static step."""
        static = any(scheme.activation_mode == "static_tensor" for scheme in self.schemes.values())
        return bool(self.settings.epochs) or static

    def _scale_channels(self) -> None:
        """With the scales of the progress where there are any, else after a look at all segments."""
        if not self.settings.cfp_activations:
            return
        scaling = ChannelScaling(self.stack, list(self.schemes), self.settings)
        if self.progress.windows or self.progress.scales:
            scaling.apply(self.progress.scales)
        else:
            self.progress.scales = scaling.fit(self.segments)

    # One window

    def _window(self, index: int) -> None:
        """Optimise the blocks of one window."""
        began, memory = time.perf_counter(), PeakMemory(self.device)
        start, end = self.windows[index]
        self._leave_behind(start)
        self.stack.keep(start, end)
        if self.settings.epochs:
            following = self.windows[index + 1][0] if index + 1 < len(self.windows) else end
            self.branches.set_targets(start, end, following)
        self._insert(start, end)
        row: dict[str, Any] = {"window": index, "blocks": [start, end - 1]}
        layers = list(self._learned.values())
        if self.settings.epochs and layers:
            row |= self._reconstruct(index, layers)
        roundings = [layer.rounding for layer in layers if layer.rounding is not None]
        sizes = [rounding.size for rounding in roundings]
        changed = sum(r.changed() * size for r, size in zip(roundings, sizes, strict=True))
        row["rounding_changed"] = changed / sum(sizes) if sizes else 0.0
        row["seconds"] = time.perf_counter() - began
        row["peak_memory_bytes"] = memory.stop()
        self.progress.rows.append(row)
        self._finish_window(index)

    def _reconstruct(self, index: int, layers: list[LearnedLayer]) -> dict[str, float]:
        """Learn; loss and errors before and after, for the report, on learned and on held-out segments."""
        task = Reconstruction(self.stack, self.branches, self.windows[index], layers, self.settings)
        order = torch.Generator().manual_seed(derived_seed(self.settings.seed, "order", index))
        parts = {"": task.learned[: self.report_segments], "held_out_": task.held_out}

        def measure(when: str) -> dict[str, float]:
            return {
                f"{part}{key}_{when}": value
                for part, segments in parts.items()
                if segments
                for key, value in task.measure(segments).items()
            }

        for layer in layers:
            layer.active = True
        row = measure("before")
        row["passes"] = task.optimise(index, order)
        row |= measure("after")
        for layer in layers:
            layer.active = False
        return row

    def _finish_window(self, index: int) -> None:
        """Harden what the next window leaves behind, and keep the state of the rest."""
        if index + 1 < len(self.windows):
            self._leave_behind(self.windows[index + 1][0])
        else:
            self.branches.clear()
            self._leave_behind(self.windows[-1][1])
        self.progress.windows = index + 1
        self.progress.learned = {
            name: {
                key: value.detach().cpu().clone()
                for key, value in layer.named_parameters()
                if not key.startswith("layer.")
            }
            for name, layer in self._learned.items()
        }
        if self.on_window is not None:
            self.on_window(self.progress)

    # Learned layers

    def _learn(self, name: str) -> LearnedLayer:
        """A fresh learned layer for a linear layer of the network; it is not put in place."""
        layer, scheme, settings = self.network.get_submodule(name), self.schemes[name], self.settings
        rounding = None
        if scheme.bits < 16:
            weight = matrix_of(layer)
            if settings.cfp_weights:
                weight, cut = truncate_outliers(weight, settings)
                if cut:
                    self.progress.thresholds[name] = cut
            rounding = self._rounding(name, weight, scheme)
        activation = ActivationQuantizer(scheme.activation_bits, scheme.activation_mode)
        return LearnedLayer(layer, scheme, rounding, activation)

    def _rounding(self, name: str, weight: Tensor, scheme: Scheme) -> LearnedRounding | LearnedOffset:
        """What is learned about the weight of a layer."""
        settings = self.settings
        grid = (scheme.bits, scheme.group_size, scheme.symmetric)
        if settings.rounding_form == "offset":
            rank: Literal["full", 0] = "full" if settings.rounding_rank == "full" else 0
            return LearnedOffset(weight, *grid, rank=rank, learn_ends=settings.learn_steps)
        return LearnedRounding(
            weight,
            *grid,
            rank=settings.rounding_rank,
            init=settings.rounding_init,
            generator=torch.Generator().manual_seed(derived_seed(settings.seed, name)),
            learn_step=settings.learn_steps,
        )

    def _insert(self, start: int, end: int) -> None:
        """Put learned layers in the blocks of a window; those that are there go on."""
        for index in range(start, end):
            fresh = {}
            for name in self.stack.layer_names(index, list(self.schemes)):
                if name in self._learned:
                    continue
                layer = fresh[name] = self._learned[name] = self._learn(name)
                replace_module(self.network, name, layer)
            if any(self.schemes[name].activation_mode == "static_tensor" for name in fresh):
                self._first_steps(start, index, fresh)
            for name, layer in fresh.items():
                if name in self.progress.learned:
                    layer.load_state_dict(self.progress.learned[name], strict=False)

    @torch.no_grad()
    def _first_steps(self, start: int, index: int, layers: dict[str, LearnedLayer]) -> None:
        """Static activation steps from the largest input over the calibration set, in full precision."""
        channels = ChannelRange(dict(layers.items()))
        for indices in self.branches.batches():
            self.stack.run(start, index + 1, self.branches.inputs(indices), indices)
        channels.remove()
        for name, layer in layers.items():
            largest = float(maximum(channels.magnitude(name).amax()))
            scheme = layer.scheme
            layer.activation = ActivationQuantizer(scheme.activation_bits, scheme.activation_mode, largest)
            layer.activation.to(self.device)

    def _leave_behind(self, start: int) -> None:
        """Harden what lies before `start`, and move both branches there."""
        for index in range(self.branches.positions["quantized"], start):
            self.branches.advance("full", index + 1)  # with the original weights, which end here
            for name in self.stack.layer_names(index, list(self.schemes)):
                layer = self._learned.pop(name, None)
                if layer is not None:
                    self.progress.matrices[name] = layer.harden()
                    replace_module(self.network, name, layer.layer)
                elif name not in self.progress.matrices:
                    self.progress.matrices[name] = self._learn(name).harden()
                handle = self.progress.matrices[name].install(self.network.get_submodule(name))
                if handle is not None:
                    self.handles.append(handle)
            self.branches.advance("quantized", index + 1)
