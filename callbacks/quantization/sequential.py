"""RTN and GPTQ on a whole network, in plain torch."""

import time
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.measure.memory import PeakMemory
from callbacks.quantization.blocks import BlockStack
from callbacks.quantization.error_feedback import gptq_integers
from callbacks.quantization.experts import Expert
from callbacks.quantization.grid import fit_grid, to_integers
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


class InputHessian:
    """H = 2 X^T X / rows of a layer's inputs, summed up by a hook in float32."""

    def __init__(self, layer: nn.Module) -> None:
        weight = matrix_of(layer)
        self._sum = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        self._rows = 0
        self._handle = layer.register_forward_pre_hook(lambda _, arguments: self._see(arguments[0]))

    def _see(self, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).float()
        self._sum += flat.T @ flat
        self._rows += len(flat)

    def finish(self) -> Tensor | None:
        """(d_in, d_in) over all ranks, None where nothing went through the layer; takes the hook off."""
        self._handle.remove()
        rows = total(torch.tensor(float(self._rows), device=self._sum.device))
        if not rows:
            return None
        return 2 * total(self._sum) / rows


class SequentialGPTQ:
    """GPTQ block after block, each on what the quantized blocks before it give.

    Args:
        network: causal language model; changed in place.
        blocks: path of its blocks.
        schemes: `{layer name: scheme}`.
        segments: this rank's token ids, (segments, length).
        damp: share of the mean diagonal of the Hessian that is added to it.
        batch_size: segments that pass through a block at once.
        device: where blocks run.
        true_sequential: within a block too, each layer sees what the quantized layers before it give; False
            takes the inputs of all layers of a block from its unquantized form.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: str,
        schemes: dict[str, Scheme],
        segments: Tensor,
        damp: float = 0.01,
        batch_size: int = 1,
        device: torch.device | None = None,
        true_sequential: bool = True,
    ) -> None:
        self.network = network
        self.schemes = schemes
        self.segments = segments
        self.damp = damp
        self.batch_size = batch_size
        self.true_sequential = true_sequential
        self.device = device or torch.device("cpu")
        self.stack = BlockStack(network, blocks, segments, self.device)
        self.handles: list[RemovableHandle] = []
        self.rows: list[dict[str, Any]] = []

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
            watched.append(InputHessian(self.network.get_submodule(first)) if first else None)
        if any(watched):
            for number, batch in enumerate(hidden):
                self._run(index, number, batch)
        matrices: dict[str, QuantizedMatrix] = {}
        for group, inputs in zip(groups, watched, strict=True):
            hessian = inputs.finish() if inputs else None
            if inputs is not None and hessian is None:
                self._unreached(group[0])
            for name in group:
                layer, scheme = self.network.get_submodule(name), self.schemes[name]
                matrices[name] = QuantizedMatrix(scheme)
                if scheme.bits < 16 and hessian is None:
                    matrices[name] = nearest_matrix(layer, scheme)
                elif scheme.bits < 16:
                    matrices[name] = self._matrix(layer, scheme, hessian)
                handle = matrices[name].install(layer)
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

    def _matrix(self, layer: nn.Module, scheme: Scheme, hessian: Tensor) -> QuantizedMatrix:
        weight = matrix_of(layer).float()
        options = (scheme.bits, scheme.group_size, scheme.symmetric)
        integers, grid = gptq_integers(weight, hessian, *options, damp=self.damp)
        plain = to_integers(weight, fit_grid(weight, *options))
        matrix = QuantizedMatrix.of(scheme, integers, grid)
        return replace(matrix, changed=float((plain != integers).double().mean()))
