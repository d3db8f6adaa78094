"""CBQ's engine: windows of blocks are reconstructed together, one window after another (spec 2.4, 2.9).

Plain torch: `CrossBlock(network, schemes, segments, settings).run()` leaves the network quantized.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.measure.memory import PeakMemory
from callbacks.quantization.activations import ActivationQuantizer
from callbacks.quantization.blocks import BlockStack, HiddenStates, chunks
from callbacks.quantization.folding import ChannelRange, apply_fold, fold_scales, folds_of
from callbacks.quantization.layers import LearnedLayer, matrix_of, replace_module
from callbacks.quantization.losses import hidden_error, reconstruction_loss
from callbacks.quantization.outliers import detect_outliers, truncated
from callbacks.quantization.ranks import average, maximum, rank_and_world
from callbacks.quantization.rounding import LearnedRounding, beta_at
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
        self.settings = settings
        self.device = device or torch.device("cpu")
        self.stack = BlockStack(network, blocks, segments[:1], self.device, autocast, offload)
        self.progress = progress or Progress()
        self.on_window = on_window
        self.report_segments = min(report_segments, len(segments))
        self._cache_directory = cache_directory
        self._cache_dtype = cache_dtype
        self._learned: dict[str, LearnedLayer] = {}
        self._caches: dict[str, HiddenStates] = {}
        self._positions = {"full": 0, "quantized": 0}
        self.handles: list[RemovableHandle] = []  # of the activation quantizers that stay

    # The whole

    def run(self) -> Progress:
        """Quantize every block; the network ends with hard weights."""
        self.network.eval()
        frozen = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            self._preprocess()
            if self.settings.epochs and self.progress.windows < len(self.windows):
                self._fill_caches()
            for index in range(self.progress.windows, len(self.windows)):
                self._window(index)
            self._leave_behind(self.windows[-1][1])
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self.stack.keep(0, len(self.stack))
        self._caches.clear()
        return self.progress

    # CFP

    def _preprocess(self) -> None:
        """Scale the channels: with the scales of the progress where there are any, else after a look at all
        segments.
        """
        if not self.settings.cfp_activations:
            return
        if self.progress.windows or self.progress.scales:
            for key, scales in self.progress.scales.items():
                index, place = (int(part) for part in key.split("/"))
                self.stack.keep(index, index + 1)
                block = self.stack.blocks[index]
                fold = self._folds(index)[place]
                apply_fold(fold, block, scales.to(self.device))
            return
        hidden = [self.stack.embed(ids) for ids in self.segments.split(self._chunk)]
        last = 1 + max(i for i in range(len(self.stack)) if self.stack.layer_names(i, list(self.schemes)))
        for index in range(last):
            self._scale_block(index, hidden)

    def _folds(self, index: int) -> list[Any]:
        names = self.stack.layer_names(index, list(self.schemes))
        prefix = f"{self.stack.name(index)}."
        return folds_of(self.stack.blocks[index], [name.removeprefix(prefix) for name in names])

    @torch.no_grad()
    def _scale_block(self, index: int, hidden: list[Tensor]) -> None:
        """Fold the scales of a block; `hidden` moves on behind it."""
        self.stack.keep(index, index + 1)
        block, folds = self.stack.blocks[index], self._folds(index)
        channels = ChannelRange({fold.consumers[0]: block.get_submodule(fold.consumers[0]) for fold in folds})
        probe = hidden[0][:1]
        for place, batch in enumerate(hidden):
            hidden[place] = self.stack.run(index, index + 1, batch)
        channels.remove()
        for extremes, sign in ((channels.largest, 1), (channels.smallest, -1)):
            for values in extremes.values():
                values.copy_(sign * maximum(sign * values))
        options = {
            "coarse_factor": self.settings.cfp_coarse_factor,
            "variance_weight": self.settings.cfp_variance_weight,
            "min_gap": self.settings.cfp_min_gap,
        }
        before = self.stack.run(index, index + 1, probe)
        for place, fold in enumerate(folds):
            scales = fold_scales(fold, block, channels, self.settings.cfp_variant, options)
            if bool((scales == 1).all()):
                continue
            apply_fold(fold, block, scales)
            moved = (self.stack.run(index, index + 1, probe) - before).abs().amax() / before.abs().amax()
            if moved > 1e-3:  # something else reads these channels, or the norm is of another kind
                apply_fold(fold, block, 1 / scales)
                continue
            self.progress.scales[f"{index}/{place}"] = scales.cpu()

    def _truncate(self, name: str, weight: Tensor) -> Tensor:
        """The weight that the quantizer starts from."""
        settings = self.settings
        if not settings.cfp_weights:
            return weight
        options = (settings.cfp_coarse_factor, settings.cfp_variance_weight, settings.cfp_min_gap)
        if settings.cfp_granularity == "channel":
            found = [detect_outliers(row.abs(), *options) for row in weight]
            threshold: float | Tensor = weight.new_tensor([[each.threshold] for each in found])
            count, shown = sum(each.outliers for each in found), min(each.threshold for each in found)
        else:
            one = detect_outliers(weight.abs(), *options)
            threshold, count, shown = one.threshold, one.outliers, one.threshold
        if count:
            self.progress.thresholds[name] = {"threshold": float(shown), "weights": count}
        return truncated(weight, threshold) if count else weight

    # Caches

    @property
    def _chunk(self) -> int:
        """Segments that pass through blocks at once without a graph."""
        return max(1, self.settings.batch_size)

    def _cache(self, name: str, like: Tensor) -> HiddenStates:
        shape = (len(self.segments), *like.shape[1:])
        file = None
        if self._cache_directory is not None:
            self._cache_directory.mkdir(parents=True, exist_ok=True)
            file = str(self._cache_directory / f"{name}_{rank_and_world()[0]}.bin")
        return HiddenStates(shape, self._cache_dtype, like.new_empty(0), file)

    def _fill_caches(self) -> None:
        """Embeddings in both branches; then as far as the progress has got."""
        for places in chunks(len(self.segments), self._chunk):
            hidden = self.stack.embed(self.segments[places])
            if not self._caches:
                self._caches = {
                    name: self._cache(name, hidden)
                    for name in ("full", "quantized", "target", *["homologous"] * self.settings.homologous)
                }
            self._caches["full"].write(places, hidden)
            self._caches["quantized"].write(places, hidden)

    @torch.no_grad()
    def _advance(self, branch: str, to: int) -> None:
        """Move a cache to the input of block `to`."""
        start = self._positions[branch]
        if self._caches and start < to:
            cache = self._caches[branch]
            for places in chunks(len(cache), self._chunk):
                cache.write(places, self.stack.run(start, to, cache.read(places)))
        self._positions[branch] = max(start, to)

    def _leave_behind(self, start: int) -> None:
        """Harden what lies before `start`, and move both caches there."""
        for index in range(self._positions["quantized"], start):
            self._advance("full", index + 1)  # with the original weights, which end here
            for name in self.stack.layer_names(index, list(self.schemes)):
                layer = self._learned.pop(name, None)
                if layer is not None:
                    self.progress.matrices[name] = layer.harden()
                    replace_module(self.network, name, layer.layer)
                elif name not in self.progress.matrices:
                    plain = self._learn(name)
                    self.progress.matrices[name] = plain.harden()
                handle = self.progress.matrices[name].install(self.network.get_submodule(name))
                if handle is not None:
                    self.handles.append(handle)
            self._advance("quantized", index + 1)

    @torch.no_grad()
    def _targets(self, start: int, end: int, following: int) -> None:
        """H_fp and H_homo, once a window; the full-precision cache moves on to `following` in the same
        pass.
        """
        same = start == 0 or self._positions["quantized"] == 0
        for places in chunks(len(self.segments), self._chunk):
            hidden = self._caches["full"].read(places)
            for index in range(start, following):  # block by block, as a resumed run gets there
                self._caches["full"].write(places, self.stack.run(index, index + 1, hidden))
                hidden = self._caches["full"].read(places)
            target = self.stack.run(following, end, hidden)
            self._caches["target"].write(places, target)
            if self.settings.homologous:
                if not same:
                    target = self.stack.run(start, end, self._caches["quantized"].read(places))
                self._caches["homologous"].write(places, target)
        self._positions["full"] = following

    # One window

    def _learn(self, name: str) -> LearnedLayer:
        """A fresh learned layer for a linear layer of the network; it is not put in place."""
        layer, scheme, settings = self.network.get_submodule(name), self.schemes[name], self.settings
        rounding = None
        if scheme.bits < 16:
            generator = torch.Generator().manual_seed(derived_seed(settings.seed, name))
            rounding = LearnedRounding(
                self._truncate(name, matrix_of(layer)),
                *(scheme.bits, scheme.group_size, scheme.symmetric),
                rank=settings.rounding_rank,
                init=settings.rounding_init,
                generator=generator,
                learn_step=settings.learn_steps,
            )
        activation = ActivationQuantizer(scheme.activation_bits, scheme.activation_mode)
        return LearnedLayer(layer, scheme, rounding, activation)

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
        for places in chunks(len(self.segments), self._chunk):
            self.stack.run(start, index + 1, self._caches["quantized"].read(places))
        channels.remove()
        for name, layer in layers.items():
            largest = float(maximum(channels.magnitude(name).amax()))
            scheme = layer.scheme
            layer.activation = ActivationQuantizer(scheme.activation_bits, scheme.activation_mode, largest)
            layer.activation.to(self.device)

    def _window(self, index: int) -> None:
        """Optimise the blocks of one window."""
        began, memory = time.perf_counter(), PeakMemory(self.device)
        start, end = self.windows[index]
        self._leave_behind(start)
        self.stack.keep(start, end)
        if self.settings.epochs:
            following = self.windows[index + 1][0] if index + 1 < len(self.windows) else end
            self._targets(start, end, following)
        self._insert(start, end)
        row: dict[str, Any] = {"window": index, "blocks": [start, end - 1]}
        layers = [layer for name, layer in self._learned.items()]
        if self.settings.epochs and layers:
            self._activate(True)
            before = self._measure(start, end)
            self._optimise(index, layers)
            after = self._measure(start, end)
            self._activate(False)
            row |= {f"{key}_before": value for key, value in before.items()}
            row |= {f"{key}_after": value for key, value in after.items()}
        roundings = [layer.rounding for layer in layers if layer.rounding is not None]
        sizes = [rounding.lower.numel() for rounding in roundings]
        changed = sum(r.changed() * size for r, size in zip(roundings, sizes, strict=True))
        row["rounding_changed"] = changed / sum(sizes) if sizes else 0.0
        row["seconds"] = time.perf_counter() - began
        row["peak_memory_bytes"] = memory.stop()
        self.progress.rows.append(row)
        self._finish_window(index)

    def _finish_window(self, index: int) -> None:
        """Harden what the next window leaves behind, and keep the state of the rest."""
        if index + 1 < len(self.windows):
            self._leave_behind(self.windows[index + 1][0])
        else:
            self._caches.clear()
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

    def _activate(self, active: bool) -> None:
        for layer in self._learned.values():
            layer.active = active

    def _loss(self, places: Any, output: Tensor) -> Tensor:
        """L_rec of a batch."""
        skip = self.settings.skip_first_tokens
        target = self._caches["target"].read(places)[:, skip:]
        homologous = self._caches["homologous"].read(places)[:, skip:] if self.settings.homologous else None
        return reconstruction_loss(
            target, homologous, output[:, skip:], l2=self.settings.loss_l2, kl=self.settings.loss_kl
        )

    @torch.no_grad()
    def _measure(self, start: int, end: int) -> dict[str, float]:
        """Loss and squared errors against full precision of the hard weights, on a few segments."""
        soft = [layer.rounding for layer in self._learned.values() if layer.rounding is not None]
        states = [rounding.hard for rounding in soft]
        for rounding in soft:
            rounding.hard = True
        totals = torch.zeros(3, dtype=torch.float64)
        for places in chunks(self.report_segments, self._chunk):
            output = self.stack.run(start, end, self._caches["quantized"].read(places))
            target = self._caches["target"].read(places)
            errors = (
                self._loss(places, output),
                hidden_error(target, output, kl=False),
                hidden_error(target[:, 1:], output[:, 1:], kl=False),
            )
            totals += len(output) * torch.stack([error.double().cpu() for error in errors])
        for rounding, state in zip(soft, states, strict=True):
            rounding.hard = state
        average([totals])
        names = ("loss", "mse", "mse_without_token_0")
        return dict(zip(names, (totals / self.report_segments).tolist(), strict=True))

    def _groups(self, layers: list[LearnedLayer]) -> list[dict[str, Any]]:
        roundings = [layer.rounding for layer in layers if layer.rounding is not None]
        settings = self.settings
        groups = [
            {"params": [p for r in roundings for p in r.rounding_parameters()], "lr": settings.lr_rounding},
            {"params": [r.scale for r in roundings if settings.learn_steps], "lr": settings.lr_weight_step},
            {
                "params": [layer.activation.step for layer in layers if layer.activation.step is not None],
                "lr": settings.lr_act_step,
            },
        ]
        return [group for group in groups if group["params"]]

    def _optimise(self, index: int, layers: list[LearnedLayer]) -> None:
        """`epochs` passes over the segments in a seeded order; Adam, cosine to 0."""
        settings, (start, end) = self.settings, self.windows[index]
        groups = self._groups(layers)
        if not groups:
            return
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in groups]
        batches = math.ceil(len(self.segments) / settings.batch_size)
        total = settings.epochs * batches
        generator = torch.Generator().manual_seed(derived_seed(settings.seed, "order", index))
        for step in range(total):
            if step % batches == 0:
                order = torch.randperm(len(self.segments), generator=generator)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
            hard = step >= settings.hard_start * total
            at = step % batches * settings.batch_size
            places = order[at : at + settings.batch_size]
            loss = self._step_loss(places, (start, end), layers, hard, step, total)
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(
                    f"The reconstruction loss is {loss.item()} in window {index} (blocks "
                    f"{start}..{end - 1}), step "
                    f"{step} of {total}, with learning rates {rates}. Lower them, or calibrate in float32."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average(p.grad for p in parameters if p.grad is not None)
            optimizer.step()
            for layer in layers:
                if layer.rounding is not None:
                    layer.rounding.clamp_steps()
                if layer.activation.step is not None:
                    layer.activation.step.data.clamp_(min=1e-8)
        for layer in layers:
            if layer.rounding is not None:
                layer.rounding.hard = True

    def _step_loss(
        self,
        places: Tensor,
        blocks: tuple[int, int],
        layers: list[LearnedLayer],
        hard: bool,
        step: int,
        total: int,
    ) -> Tensor:
        settings = self.settings
        roundings = [layer.rounding for layer in layers if layer.rounding is not None]
        for rounding in roundings:
            rounding.hard = hard
        output = self.stack.run(*blocks, self._caches["quantized"].read(places))
        loss = self._loss(places, output)
        learns = any(rounding.rounding_parameters() for rounding in roundings)
        if not hard and settings.lambda_com and learns:
            beta = beta_at(step, total, settings.beta_start, settings.beta_end, settings.beta_warmup)
            loss = loss + settings.lambda_com * torch.stack([r.penalty(beta) for r in roundings]).mean()
        return loss
