"""RTN and GPTQ on a whole network, in plain torch."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.measure.memory import PeakMemory
from callbacks.quantization.blocks import BlockStack
from callbacks.quantization.error_feedback import best_damp, gptq_integers
from callbacks.quantization.experts import Expert
from callbacks.quantization.grid import Grid, fit_grid, to_integers
from callbacks.quantization.layers import QuantizedMatrix, matrix_of
from callbacks.quantization.ranks import of_first_rank, total
from callbacks.quantization.scheme import Scheme


def nearest_matrix(layer: nn.Module, scheme: Scheme) -> QuantizedMatrix:
    """A layer rounded to nearest."""
    if scheme.bits >= 16:
        return QuantizedMatrix(scheme)
    weight = matrix_of(layer).float()
    grid = fit_grid(weight, scheme.bits, scheme.group_size, scheme.symmetric)
    kept = grid.scale.to(matrix_of(layer).dtype).float()  # as the layer's type keeps the steps
    grid = replace(grid, scale=torch.where(kept > 0, kept, grid.scale))
    return QuantizedMatrix.of(scheme, to_integers(weight, grid), grid)


class _Enough(Exception):
    """Leaves a block at the layer whose inputs are watched."""


class InputHessian:
    """H = 2 X^T X / rows of a layer's inputs, summed up by a hook in float32.

    Args:
        layer: a linear layer.
        leave: end the forward pass at the layer.
    """

    def __init__(self, layer: nn.Module, leave: bool = False) -> None:
        self._leave = leave
        weight = matrix_of(layer)
        self._sum = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        self._fitted: Tensor | None = None
        self._fitted_rows = 0
        self._rows = 0
        self._handle = layer.register_forward_pre_hook(lambda _, arguments: self._see(arguments[0]))

    def _see(self, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).float()
        self._sum.addmm_(flat.T, flat)
        self._rows += len(flat)
        if self._leave:
            raise _Enough

    def hold_out(self) -> None:
        """What comes from here on is held out."""
        self._fitted, self._fitted_rows = self._sum.clone(), self._rows

    def parts(self) -> tuple[Tensor, Tensor] | None:
        """The sums over what came before `hold_out` and after it, over all ranks; None where one is empty."""
        if self._fitted is None:
            return None
        rows = total(torch.tensor([self._fitted_rows, self._rows], dtype=torch.float32)).tolist()
        if not 0 < rows[0] < rows[1]:  # an expert that few tokens reach
            return None
        fitted = total(self._fitted)
        return fitted, self._whole - fitted

    def finish(self) -> Tensor | None:
        """(d_in, d_in) over all ranks, None where nothing went through the layer; takes the hook off."""
        self._handle.remove()
        rows = total(torch.tensor(float(self._rows), device=self._sum.device))
        if not rows:
            return None
        self._whole = total(self._sum)
        return 2 * self._whole / rows


class SequentialGPTQ:
    """GPTQ block after block, each on what the quantized blocks before it give.

    Args:
        network: causal language model; changed in place.
        blocks: path of its blocks.
        schemes: `{layer name: scheme}`.
        segments: this rank's token ids, (segments, length).
        damp: share of the mean diagonal of the Hessian that is added to it. Of several, each group of layers
            takes the one that errs least on the last quarter of the segments after a fit to the others; the
            final fit is to all.
        batch_size: segments that pass through a block at once.
        device: where blocks run.
        true_sequential: within a block too, each layer sees what the quantized layers before it give; False
            takes the inputs of all layers of a block from its unquantized form.
        act_order: see `gptq_integers`.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: str,
        schemes: dict[str, Scheme],
        segments: Tensor,
        damp: float | Sequence[float] = 0.01,
        batch_size: int = 1,
        device: torch.device | None = None,
        true_sequential: bool = True,
        act_order: bool = False,
    ) -> None:
        self.network = network
        self.schemes = schemes
        self.segments = segments
        self.damps = [damp] if isinstance(damp, float) else list(damp)
        self.batch_size = batch_size
        self.true_sequential = true_sequential
        self.act_order = act_order
        self.device = device or torch.device("cpu")
        self.stack = BlockStack(network, blocks, segments, self.device)
        self.handles: list[RemovableHandle] = []
        self.rows: list[dict[str, Any]] = []
        self._once: set[str] = set()  # layers of the present block that a forward pass reaches once

    @torch.no_grad()
    def run(self) -> dict[str, QuantizedMatrix]:
        """Final integers by layer name; the network ends with their weights."""
        self.network.eval()
        matrices: dict[str, QuantizedMatrix] = {}
        hidden = [self.stack.embed(ids).cpu() for ids in self.segments.split(self.batch_size)]
        indices = [i for i in range(len(self.stack)) if self.stack.layer_names(i, list(self.schemes))]
        for index in range(indices[-1] + 1):
            began, memory = time.perf_counter(), PeakMemory(self.device)
            groups = self._groups(index, hidden)
            for together in self._in_turn(groups) if self.true_sequential else [groups]:
                matrices |= self._quantize(index, together, hidden)
            if index < indices[-1]:
                for number, batch in enumerate(hidden):
                    hidden[number] = self._run(index, number, batch).cpu()
            row = {"block": index, "seconds": time.perf_counter() - began}
            self.rows.append({**row, "peak_memory_bytes": memory.stop()})
        return matrices

    def _run(self, index: int, number: int, batch: Tensor) -> Tensor:
        """A batch of hidden states behind a block."""
        indices = slice(number * self.batch_size, number * self.batch_size + len(batch))
        return self.stack.run(index, index + 1, batch.to(self.device), indices)

    def _in_turn(self, groups: list[list[str]]) -> list[list[list[str]]]:
        """Groups that are quantized together: those of all experts of a parameter, the others alone."""
        turns: dict[Any, list[list[str]]] = {}
        for group in groups:
            layer = self.network.get_submodule(group[0])
            key = (layer.owner, layer.parameter) if isinstance(layer, Expert) else group[0]
            turns.setdefault(key, []).append(group)
        return list(turns.values())

    def _groups(self, index: int, hidden: list[Tensor]) -> list[list[str]]:
        """The layers of a block as they are executed, those of one input together."""
        names = self.stack.layer_names(index, list(self.schemes))
        inputs: dict[str, list[Tensor]] = {}  # held, so that no other gets the same id
        handles = [
            self.network.get_submodule(name).register_forward_pre_hook(
                lambda _, arguments, name=name: inputs.setdefault(name, []).append(arguments[0])
            )
            for name in names
        ]
        try:
            self.stack.run(index, index + 1, hidden[0][:1].to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        self._once = {name for name, seen in inputs.items() if len(seen) == 1}
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, seen in inputs.items():
            groups.setdefault(tuple(map(id, seen)), []).append(name)
        return of_first_rank([*groups.values(), *([name] for name in names if name not in inputs)])

    def _quantize(
        self, index: int, groups: list[list[str]], hidden: list[Tensor]
    ) -> dict[str, QuantizedMatrix]:
        """Quantize some groups of layers of a block; a group shares its Hessian."""
        watched: list[InputHessian | None] = []
        for group in groups:
            first = next((name for name in group if self.schemes[name].bits < 16), None)
            leave = len(groups) == 1 and first in self._once
            watched.append(InputHessian(self.network.get_submodule(first), leave) if first else None)
        if any(watched):
            self._watch(index, [inputs for inputs in watched if inputs], hidden)
        matrices: dict[str, QuantizedMatrix] = {}
        for group, inputs in zip(groups, watched, strict=True):
            hessian = inputs.finish() if inputs else None
            if inputs is not None and hessian is None:
                self._unreached(group[0])
            for scheme in dict.fromkeys(self.schemes[name] for name in group):
                names = [name for name in group if self.schemes[name] == scheme]
                if scheme.bits >= 16:
                    matrices |= {name: QuantizedMatrix(scheme) for name in names}
                elif inputs is None or hessian is None:
                    layers = {name: self.network.get_submodule(name) for name in names}
                    matrices |= {name: nearest_matrix(layer, scheme) for name, layer in layers.items()}
                else:
                    matrices |= self._matrices(names, scheme, hessian, inputs.parts())
            for name in group:
                handle = matrices[name].install(self.network.get_submodule(name))
                if handle is not None:
                    self.handles.append(handle)
        return matrices

    def _unreached(self, name: str) -> None:
        """Say that an expert is rounded to nearest; refuse any other layer that nothing went through."""
        if "expert" in name:
            rank_zero_warn(f"GPTQ: no calibration token reached {name}: it is rounded to nearest.")
            return
        raise MisconfigurationException(
            f"GPTQ: no calibration token reached {name}: give more calibration segments, or leave "
            "it alone with `ignore`."
        )

    def _watch(self, index: int, watched: list[InputHessian], hidden: list[Tensor]) -> None:
        """Run a block on all segments."""
        held_out = -(-len(hidden) // 4) if len(self.damps) > 1 else 0
        for number, batch in enumerate(hidden):
            if held_out and number == len(hidden) - held_out:
                for inputs in watched:
                    inputs.hold_out()
            with suppress(_Enough):
                self._run(index, number, batch)

    def _matrices(
        self, names: list[str], scheme: Scheme, hessian: Tensor, parts: tuple[Tensor, Tensor] | None
    ) -> dict[str, QuantizedMatrix]:
        """Layers of one input and one scheme, as one matrix: rows do not depend on each other."""
        weights = [matrix_of(self.network.get_submodule(name)).float() for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        grid = (scheme.bits, scheme.group_size, scheme.symmetric)
        damp = self.damps[0]
        if parts is not None:
            damp = best_damp(weight, *parts, self.damps, grid, self.act_order)
        integers, found = gptq_integers(weight, hessian, *grid, damp=damp, act_order=self.act_order)
        changed = to_integers(weight, fit_grid(weight, *grid)) != integers
        matrices, first = {}, 0
        for name, rows in zip(names, map(len, weights), strict=True):
            here = slice(first, first + rows)
            own = Grid(found.scale[here], found.zero_point[here], found.low, found.high)
            matrix = QuantizedMatrix.of(scheme, integers[here], own)
            matrices[name] = replace(matrix, changed=float(changed[here].double().mean()))
            first += rows
        return matrices
