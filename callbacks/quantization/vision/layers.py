"""Layers and products with their quantizers, and the search for their steps (spec 2.5)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from callbacks.quantization.scheme import VisionScheme
from callbacks.quantization.vision.operands import (
    SPLITS,
    AffineOperand,
    GELUOperand,
    Operand,
    SoftmaxOperand,
    SoftmaxQuant,
    UniformOperand,
)
from callbacks.quantization.vision.products import Product
from callbacks.quantization.vision.search import Grid, candidate_steps

Captured = tuple[tuple[Tensor, ...], Tensor]
"""Inputs of a call and the gradient of the loss by its output."""


@dataclass(frozen=True)
class SearchOptions:
    """How steps are found.

    Attributes:
        lowest: candidate i is the min-max step times lowest + i (highest - lowest) / candidates.
        highest: see `lowest`.
        candidates: n.
        rounds: of both operands in turn.
        every: see `Grid`.
    """

    lowest: float = 0.01
    highest: float = 1.2
    candidates: int = 100
    rounds: int = 3
    every: bool = False


class QuantizedUnit(ABC):
    """What is quantized together: the two operands of a layer or a product.

    Attributes:
        indices: number of the chosen candidate of each operand, empty without a search.
        objective: sum of errors with the steps of the operand that was searched last.
    """

    def __init__(self) -> None:
        self.indices: dict[str, Tensor] = {}
        self.objective: float | None = None

    @abstractmethod
    def operands(self) -> dict[str, Operand]:
        """By name, in the order of the search."""

    @abstractmethod
    def set_minmax(self, calls: Sequence[Captured]) -> None:
        """The min-max step of each operand."""

    @abstractmethod
    def search(self, calls: Sequence[Captured], options: SearchOptions) -> None:
        """Better steps, from those of `set_minmax` on."""

    @abstractmethod
    def install(self) -> None:
        """Quantize from now on."""


class QuantizedLayer(QuantizedUnit):
    """A linear layer or convolution, whose weight is rounded in place and whose input by a hook.

    Args:
        layer: with a `weight`; its own forward pass computes everything.
        scheme: bits and groups.
        after_gelu: the input is a GELU's output.
        aligned: see `AffineOperand`.
        row_groups: of a linear layer's weight.
    """

    def __init__(
        self, layer: nn.Module, scheme: VisionScheme, after_gelu: bool, aligned: bool, row_groups: int
    ) -> None:
        super().__init__()
        self.layer = layer
        self.linear = isinstance(layer, nn.Linear)
        self.weight: Operand | None = None
        self.input: Operand | None = None
        if scheme.bits < 16:
            if self.linear:
                self.weight = UniformOperand(scheme.bits, groups=row_groups)
            else:
                others = (0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else (1, 2, 3)
                self.weight = UniformOperand(scheme.bits, others)
        if scheme.activation_bits < 16:
            if not self.linear:
                self.input = AffineOperand(scheme.activation_bits, aligned)
            elif after_gelu:
                self.input = GELUOperand(scheme.activation_bits)
            else:
                self.input = UniformOperand(scheme.activation_bits)
        self.to(layer.get_parameter("weight").device)

    def to(self, device: torch.device) -> None:
        """Move the operands, and make them parts of the layer."""
        for name, operand in self.operands().items():
            self.layer.add_module(f"{name}_operand", operand.to(device))

    def operands(self) -> dict[str, Operand]:
        """`weight` and `input`."""
        both = {"weight": self.weight, "input": self.input}
        return {name: operand for name, operand in both.items() if operand is not None}

    def set_minmax(self, calls: Sequence[Captured]) -> None:
        """Of the weight and of all inputs."""
        if self.weight is not None:
            self.weight.step = self.weight.base(self.layer.get_parameter("weight").detach())
        if self.input is not None:
            self.input.step = self.input.base(torch.cat([inputs[0].flatten() for inputs, _ in calls]))

    def search(self, calls: Sequence[Captured], options: SearchOptions) -> None:
        """Weight and input in turn; of convolutions the weight with the float input, then the input."""
        with torch.no_grad():
            chunks = _chunked(calls, lambda inputs: self._run(inputs[0]))
            both = self.weight is not None and self.input is not None and self.linear
            _alternate(
                self,
                {name: self._grid(name, chunks, options) for name in self.operands()},
                options.rounds if both else 1,
                options,
            )

    def _grid(self, name: str, chunks: "list[Chunk]", options: SearchOptions) -> "OperandSearch":
        steps = candidate_steps(
            self.operands()[name].step, options.lowest, options.highest, options.candidates
        )
        return OperandSearch(
            steps,
            self._weight_errors if name == "weight" else self._input_errors,
            self._groups if name == "weight" else 1,
            chunks,
            # a linear layer's weight meets the quantized input, a convolution's the float one
            depends=self.linear or name == "input",
        )

    @property
    def _groups(self) -> int:
        """Steps of the weight that are chosen apart."""
        assert isinstance(self.weight, UniformOperand)
        return self.weight.groups if self.linear else self.weight.step.numel()

    def _weight_errors(self, chunk: "Chunk", steps: Tensor) -> Tensor:
        assert self.weight is not None
        weight = self.layer.get_parameter("weight")
        candidates = self.weight.candidates(weight, steps)
        x = chunk.inputs[0]
        if self.linear and self.input is not None:
            x = self.input(x)
        if self.linear:
            rows = x.flatten(0, -2)
            product = F.linear(rows, candidates.flatten(0, 1))  # all candidates in one product
            error = chunk.output.flatten(0, -2)[:, None] - product.view(len(rows), len(steps), -1)
            if isinstance(bias := self.layer.bias, Tensor):
                error = error - bias
            error = (error * chunk.gradient.flatten(0, -2)[:, None]).square().sum(0)
        else:
            error = (chunk.output - self._run_weights(x, candidates)) * chunk.gradient
            error = error.square().sum((1, 3, 4))
        groups = self._groups
        if isinstance(self.layer, nn.ConvTranspose2d):  # rows are in the order of (conv groups, channels)
            return error.view(len(steps), -1, groups).sum(1) * chunk.share
        return error.view(len(steps), groups, -1).sum(2) * chunk.share

    def _run_weights(self, x: Tensor, candidates: Tensor) -> Tensor:
        return torch.vmap(lambda weight: functional_call(self.layer, {"weight": weight}, (x,)))(candidates)

    def _input_errors(self, chunk: "Chunk", steps: Tensor) -> Tensor:
        assert self.input is not None
        weight = self.layer.get_parameter("weight")
        weight = weight if self.weight is None else self.weight(weight)
        x = self.input.candidates(chunk.inputs[0], steps).flatten(0, 1)
        output = functional_call(self.layer, {"weight": weight}, (x,))
        error = (output.unflatten(0, (len(steps), -1)) - chunk.output) * chunk.gradient
        return error.square().flatten(1).sum(1, keepdim=True) * chunk.share

    def _run(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @torch.no_grad()
    def install(self) -> None:
        """Round the weight in place, and the input of every call from now on."""
        if self.weight is not None:
            parameter = self.layer.get_parameter("weight")
            parameter.copy_(self.weight(parameter))
            self.layer.weight_bits = float(self.weight.bits)  # type: ignore[assignment]
        if self.input is not None:
            self.layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_operand(inputs[0]), *inputs[1:])  # type: ignore[operator]


class QuantizedProduct(QuantizedUnit):
    """A product of attention.

    Args:
        product: whose operands become quantized.
        bits: of both.
        form: of the quantizer of probabilities.
    """

    def __init__(self, product: Product, bits: int, form: SoftmaxQuant, device: torch.device) -> None:
        super().__init__()
        self.product = product
        self.form = form
        self.left: Operand = SoftmaxOperand(bits, form) if product.after_softmax else UniformOperand(bits)
        self.right: Operand = UniformOperand(bits)
        self.left.to(device)
        self.right.to(device)

    def operands(self) -> dict[str, Operand]:
        """`left` and `right`."""
        return {"left": self.left, "right": self.right}

    def set_minmax(self, calls: Sequence[Captured]) -> None:
        """A step for each head; of probabilities one range."""
        for number, operand in enumerate((self.left, self.right)):
            if isinstance(operand, UniformOperand):
                first = calls[0][0][number]
                operand.dims = tuple(d for d in range(first.ndim) if first.ndim < 4 or d != first.ndim - 3)
            bases = [operand.base(inputs[number]) for inputs, _ in calls]
            operand.step = torch.stack(bases).amax(0)

    def search(self, calls: Sequence[Captured], options: SearchOptions) -> None:
        """Both in turn; of probabilities the split with the float values, then the values."""
        with torch.no_grad():
            chunks = _chunked(calls, lambda inputs: inputs[0] @ inputs[1])
            searches = {name: self._grid(name, chunks, options) for name in self.operands()}
            if self.product.after_softmax and self.form == "uniform":
                del searches["left"]
            rounds = 1 if self.product.after_softmax else options.rounds
            _alternate(self, searches, rounds, options)

    def _grid(self, name: str, chunks: "list[Chunk]", options: SearchOptions) -> "OperandSearch":
        operand = self.operands()[name]
        probabilities = isinstance(operand, SoftmaxOperand)
        if probabilities:
            steps = torch.tensor(SPLITS, device=operand.step.device)[:, None]
        else:
            steps = candidate_steps(operand.step, options.lowest, options.highest, options.candidates)

        def errors(chunk: "Chunk", some: Tensor) -> Tensor:
            a, b = chunk.inputs
            if name == "left":
                b = b if probabilities else self.right(b)
                output = self.left.candidates(a, some) @ b
            else:
                output = self.left(a) @ self.right.candidates(b, some)
            error = ((output - chunk.output) * chunk.gradient).square()
            if some[0].numel() > 1:
                error = error.movedim(-3, 1)
                return error.flatten(2).sum(2) * chunk.share
            return error.flatten(1).sum(1, keepdim=True) * chunk.share

        return OperandSearch(steps, errors, steps[0].numel(), chunks, depends=not probabilities)

    def install(self) -> None:
        """Quantize both operands from now on."""
        self.product.left, self.product.right = self.left, self.right


@dataclass(frozen=True)
class Chunk:
    """A part of the calibration set at a layer.

    Attributes:
        inputs: of the call.
        output: of the layer in full precision.
        gradient: of the loss by the output; or ones.
        share: one over the elements of a sample's output.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor
    share: float


def _chunked(
    calls: Sequence[Captured], run: Callable[[tuple[Tensor, ...]], Tensor], most: int = 8
) -> list[Chunk]:
    """Every call cut along its first axis, into up to `most` parts."""
    chunks = []
    for inputs, gradient in calls:
        count = len(gradient)
        size = max(1, -(-count // most))
        output = run(inputs)
        for start in range(0, count, size):
            part = slice(start, start + size)
            chunks.append(
                Chunk(
                    tuple(x[part] if len(x) == count else x for x in inputs),
                    output[part],
                    gradient[part],
                    count / gradient.numel(),
                )
            )
    return chunks


@dataclass(frozen=True)
class OperandSearch:
    """The candidates of one operand.

    Attributes:
        steps: (candidates, *step).
        errors: sums over a chunk for some of the steps, (steps, groups).
        groups: how many choose on their own.
        chunks: of the calibration set.
        depends: on the other operand's step.
    """

    steps: Tensor
    errors: Callable[[Chunk, Tensor], Tensor]
    groups: int
    chunks: list[Chunk]
    depends: bool

    def best(self, options: SearchOptions) -> tuple[Tensor, Tensor, float]:
        """Numbers of the best candidates by group, the steps, and the sum of errors."""
        grid = Grid(
            self.chunks,
            lambda chunk, numbers: self.errors(chunk, self.steps[numbers]),
            lambda chunk: chunk.output.numel(),
            options.every,
        )
        numbers, values = grid.best(len(self.steps), self.steps.device)
        shape = self.steps.shape[1:]
        each = numbers.repeat_interleave(shape.numel() // len(numbers)).view(shape)
        return numbers, self.steps.gather(0, each[None])[0], float(values.sum())


def _alternate(
    unit: QuantizedUnit, searches: dict[str, OperandSearch], rounds: int, options: SearchOptions
) -> None:
    """Search the operands in turn, each with the others as they are; what was found for the same others is
    not searched again.
    """
    found: dict[tuple[Any, ...], tuple[Tensor, Tensor, float]] = {}
    for _ in range(rounds):
        before = {name: operand.step for name, operand in unit.operands().items()}
        for name, search in searches.items():
            others = [
                tuple(operand.step.flatten().tolist())
                for other, operand in unit.operands().items()
                if other != name and search.depends
            ]
            key = (name, *others)
            if key not in found or options.every:
                found[key] = search.best(options)
            unit.indices[name], unit.operands()[name].step, unit.objective = found[key]
        settled = all(torch.equal(before[name], operand.step) for name, operand in unit.operands().items())
        if settled and not options.every:
            break
