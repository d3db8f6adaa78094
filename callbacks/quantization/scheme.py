"""What is quantized how: one vocabulary for RTN, GPTQ and CBQ."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from callbacks.quantization.activations import ActivationMode
from lightning_modules.parts.selection import match

LAYERS = (nn.Linear, Conv1D)
"""Types that can be quantized; Conv1D (GPT-2) is a linear layer with a transposed weight."""


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized.

    Attributes:
        bits: of the weights, 2..8, or 16 to leave them alone.
        group_size: columns that share a step; -1 is a whole row ("per channel").
        symmetric: without a zero point.
        activation_bits: of the layer's input, 2..8, or 16 to leave it alone.
        activation_mode: a step for each token on the fly, with or without a zero point, or one (learnable)
            step.
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    activation_bits: int = 16
    activation_mode: ActivationMode = "dynamic_token"

    def __post_init__(self) -> None:
        for option in ("bits", "activation_bits"):
            value = getattr(self, option)
            if not (2 <= value <= 8 or value == 16):
                raise ValueError(f"{option} must be 2..8, or 16 to leave it alone; got {value}.")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size must be positive, or -1 for a whole row; got {self.group_size}.")

    def __str__(self) -> str:
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        shifted = self.activation_bits < 16 and self.activation_mode == "dynamic_token_asymmetric"
        return f"W{self.bits}A{self.activation_bits} {group} {kind}{', asymmetric activations' * shifted}"

    @property
    def active(self) -> bool:
        """Whether anything is quantized at all."""
        return self.bits < 16 or self.activation_bits < 16


Overrides = dict[str, dict[str, Any]]


def matching(
    names: Iterable[str], patterns: Sequence[str], types: Mapping[str, str], option: str
) -> list[str]:
    """Names that match a glob, a class name (`Linear`) or a regular expression (`re:...down_proj`).

    Raises:
        ValueError: a pattern matches nothing; names `option` and near misses.
    """
    names = list(names)
    chosen: set[str] = set()
    for written in patterns:
        pattern = written.removeprefix("network.")
        if pattern.startswith("re:"):
            found = [name for name in names if re.fullmatch(pattern[3:], name)]
        else:
            found = [name for name in names if types[name] == pattern or fnmatchcase(name, pattern)]
        chosen.update(found or match(names, [pattern], option))
    return [name for name in names if name in chosen]


def resolve_schemes(
    layers: Mapping[str, nn.Module],
    scheme: Scheme,
    targets: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    overrides: Overrides | None = None,
) -> dict[str, Scheme]:
    """The scheme of every layer that is quantized, in the order of `layers`.

    Args:
        layers: `{name: Linear or Conv1D}`, the candidates.
        scheme: what holds where nothing else is said.
        targets: which of the candidates; globs over names, class names, or `re:` and a regular expression.
        ignore: which of these not.
        overrides: `{pattern: {option of Scheme: value}}`; later ones win.

    Raises:
        ValueError: a pattern matches nothing, an option is unknown or out of range, or a group size does not
            divide the inputs of some layers, which are listed.
    """
    types = {name: type(layer).__name__ for name, layer in layers.items()}
    chosen = matching(layers, targets, types, "targets")
    left_out = set(matching(layers, ignore, types, "ignore"))
    schemes = {name: scheme for name in chosen if name not in left_out}
    known = {field.name for field in fields(Scheme)}
    for pattern, options in (overrides or {}).items():
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(
                f"overrides['{pattern}']: {', '.join(unknown)} is none of {', '.join(sorted(known))}."
            )
        for name in matching(schemes, [pattern], types, "overrides"):
            schemes[name] = replace(schemes[name], **options)
    schemes = {name: found for name, found in schemes.items() if found.active}
    if not schemes:
        raise ValueError("No layer is left to quantize: see targets, ignore and overrides.")
    wrong = [
        f"{name} (group_size {found.group_size}, d_in {columns_of(layers[name])})"
        for name, found in schemes.items()
        if found.bits < 16 and found.group_size != -1 and columns_of(layers[name]) % found.group_size
    ]
    if wrong:
        raise ValueError(
            f"group_size must divide the number of inputs; it does not in {len(wrong)} layers: "
            f"{', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''}."
        )
    return schemes


def columns_of(layer: nn.Module) -> int:
    """d_in of a linear layer."""
    weight = layer.get_parameter("weight")
    return weight.shape[0] if isinstance(layer, Conv1D) else weight.shape[1]
