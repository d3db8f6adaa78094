"""What is deployed of a module, and what it takes and gives, by name."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.parts.contracts import (
    HasInference,
    HasInferenceInputs,
    HasNetwork,
    HasNormalize,
    offers,
    optional,
)

OutputKind = Literal["classes", "bernoulli", "probability", "number"]
"""What an output means: logits of classes along the last axis, of yes or no, a number in [0, 1], any."""


@dataclass(frozen=True)
class InferenceSpec:
    """How a module's inference is called: what exporters and reports cannot read from its tensors.

    Attributes:
        outputs: names of what the network gives, in order; those of a dictionary are its keys.
        unit: what a throughput counts, such as `images` or `tokens`.
        unit_axes: of the first input, whose sizes multiply to the number of units in a batch.
        free_dimensions: `{input: {axis: name}}` of sizes that may be another at inference than in the
            example; axis 0 is always free, and called `batch`.
        arguments: of the network's forward pass, beside the inputs.
        shared: inputs that all rows of a batch have in common; their axis 0 is not free.
        kinds: `{output: what it means}`, for whoever compares outputs; one that is not named is a number.
    """

    outputs: tuple[str, ...] = ("output",)
    unit: str = "samples"
    unit_axes: tuple[int, ...] = (0,)
    free_dimensions: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    kinds: Mapping[str, OutputKind] = field(default_factory=dict)

    def units(self, inputs: Mapping[str, Tensor]) -> int:
        """Units in a batch of inputs."""
        first = next(iter(inputs.values()))
        return math.prod(first.shape[axis] for axis in self.unit_axes)

    def axes(self, name: str) -> dict[int, str]:
        """The free axes of an input and their names."""
        rows = {} if name in self.shared else {0: "batch"}
        return {**rows, **self.free_dimensions.get(name, {})}

    def rows(self, inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Inputs of `count` rows, going round as often as needed."""
        return {n: x if n in self.shared else repeat_to(x, count) for n, x in inputs.items()}


@dataclass(frozen=True)
class InferencePart:
    """A network that is deployed beside the inference path, such as the decoder that an encoder feeds.

    Attributes:
        network: in the module's own weights.
        inputs: an example, by name.
        spec: as of the path.
    """

    network: nn.Module
    inputs: Mapping[str, Tensor]
    spec: InferenceSpec


CLASSIFIER = InferenceSpec(outputs=("logits",), unit="images", kinds={"logits": "classes"})
"""Images in, logits out."""

_KNOWN = {
    "image": ("image", InferenceSpec(unit="images")),
    "input_ids": ("input_ids", InferenceSpec(unit="tokens", unit_axes=(0, 1))),
}
"""By key of a batch: name of the input, and what is assumed of a module that declares nothing."""


class InferencePath(nn.Module):
    """The part of a module that is deployed: `network(normalize(images))`, or `forward` without a `network`.

    Holds the module's own parts, not copies.

    Args:
        module: the LightningModule; its attribute `network` and method `normalize` are used if it has them,
            and the arguments of its `inference`, see `InferenceSpec`.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.network = student_of(module)
        owner = optional(module, HasNormalize) if self.network is not module else None
        self._normalize = None if owner is None else owner.normalize
        self._arguments = dict(spec_of(module).arguments) if self.network is not module else {}

    def forward(self, *inputs: Tensor) -> Any:
        """Output of the network; the first input is normalised where the module knows how."""
        first, *others = inputs
        if self._normalize is not None and first.is_floating_point():
            first = self._normalize(first)
        return self.network(first, *others, **self._arguments)


def student_of(module: LightningModule) -> nn.Module:
    """What is deployed of a module: its `network`, or itself where it has none."""
    owner = optional(module, HasNetwork)
    return owner.network if owner is not None and isinstance(owner.network, nn.Module) else module


def image_network(module: LightningModule, purpose: str) -> nn.Module:
    """The `network` of a module that normalises images for it.

    Raises:
        MisconfigurationException: it has none, or no `normalize`.
    """
    if not offers(module, HasNormalize) or student_of(module) is module:
        raise MisconfigurationException(
            f"{purpose}: {type(module).__name__} has no `network` and `normalize` (HasNetwork, "
            "HasNormalize), as ImageClassifier has."
        )
    return student_of(module)


def inputs_of(module: nn.Module, batch: Any) -> dict[str, Tensor] | None:
    """The tensors of `batch` that inference takes, by name, batch first; None where that is not known.

    A module whose network takes something else than `image` or `input_ids` says so in a method
    `inference_inputs(batch) -> {name: tensor}`; names of a tuple are `input_0`, `input_1` and so on.
    """
    if (declares := optional(module, HasInferenceInputs)) is not None:
        return named_inputs(declares.inference_inputs(batch))
    if isinstance(batch, Mapping):
        for key, (name, _) in _KNOWN.items():
            if isinstance(batch.get(key), Tensor):
                return {name: batch[key]}
    return None


def spec_of(module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> InferenceSpec:
    """What a module declares in its `inference`; else what the names of its inputs tell."""
    declares = optional(module, HasInference)
    if declares is not None and isinstance(declares.inference, InferenceSpec):
        return declares.inference
    first = next(iter(inputs or {}), None)
    return next((spec for name, spec in _KNOWN.values() if name == first), InferenceSpec())


def named_inputs(inputs: Any) -> dict[str, Tensor]:
    """Inputs by name; those of a sequence are `input_0`, `input_1` and so on."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return {f"input_{number}": tensor for number, tensor in enumerate(inputs)}


def named_outputs(output: Any, names: tuple[str, ...] = (), prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested tuples, lists and dictionaries, in order, each with a name.

    Args:
        output: of a network.
        names: of tensors that stand in no dictionary.
        prefix: of the names, in a nested output.
    """
    if isinstance(output, Tensor):
        yield prefix or (names[0] if names else "output"), output
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from named_outputs(item, (), f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(output, (list, tuple)):
        for number, item in enumerate(output):
            known = not prefix and number < len(names)
            yield from named_outputs(item, (), names[number] if known else f"{prefix or 'output'}_{number}")


def repeat_to(tensor: Tensor, batch_size: int) -> Tensor:
    """(n, ...) to (batch_size, ...), going round as often as needed."""
    places = torch.arange(batch_size, device=tensor.device) % len(tensor)
    return tensor[places]
