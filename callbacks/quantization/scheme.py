"""What is quantized how: one vocabulary for RTN, GPTQ and CBQ, and for vision networks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from callbacks.quantization.activations import ActivationMode
from lightning_modules.parts.options import OptionError, check
from lightning_modules.parts.selection import match

LAYERS = (nn.Linear, Conv1D)
"""Types that can be quantized; Conv1D (GPT-2) is a linear layer with a transposed weight."""


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is quantized.

    Args:
        bits: of the weights, 2..8; 16 leaves them alone.
        group_size: weights of a row that share a step, must divide the inputs of every layer; -1: the row
            ("per channel").
        symmetric: no zero points.
        activation_bits: of the layers' inputs, 2..8; 16 leaves them alone.
        activation_mode: `dynamic_token` takes a step from each token, `dynamic_token_asymmetric` a zero point
            too, which no int8 runtime has; `static_tensor` learns one step (CBQ only).
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    activation_bits: int = 16
    activation_mode: ActivationMode = "dynamic_token"

    def __post_init__(self) -> None:
        for option in ("bits", "activation_bits"):
            value = getattr(self, option)
            check(2 <= value <= 8 or value == 16, option, value, "2..8, or 16 to leave it alone")
        size = self.group_size
        check(size >= 1 or size == -1, "group_size", size, "positive, or -1 for a whole row")

    def __str__(self) -> str:
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        shifted = self.activation_bits < 16 and self.activation_mode == "dynamic_token_asymmetric"
        return f"W{self.bits}A{self.activation_bits} {group} {kind}{', asymmetric activations' * shifted}"

    @property
    def active(self) -> bool:
        """Whether anything is quantized at all."""
        return self.bits < 16 or self.activation_bits < 16


@dataclass(frozen=True)
class VisionScheme:
    """How one layer or product of a vision network is quantized.

    Args:
        bits: of a layer's weight, 2..8; 16 or 32 leave it alone.
        activation_bits: of a layer's input and of both operands of attention's products, 2..8; 16 or 32 leave
            them alone.
    """

    bits: int = 8
    activation_bits: int = 8

    def __post_init__(self) -> None:
        for option in ("bits", "activation_bits"):
            value = getattr(self, option)
            check(2 <= value <= 8 or value in (16, 32), option, value, "2..8, or 16 or 32 to leave it alone")

    def __str__(self) -> str:
        return f"W{self.bits}A{self.activation_bits}"

    @property
    def active(self) -> bool:
        """Whether anything is quantized at all."""
        return self.bits < 16 or self.activation_bits < 16


AnyScheme = TypeVar("AnyScheme", Scheme, VisionScheme)

Overrides = dict[str, dict[str, Any]]


def matching(
    names: Iterable[str], patterns: Sequence[str], types: Mapping[str, str], option: str
) -> list[str]:
    """Names that match a glob, a class name (`Linear`) or a regular expression (`re:...down_proj`).

    Raises:
        OptionError: a pattern matches nothing; names `option` and near misses.
    """
    names = list(names)
    chosen: set[str] = set()
    for written in patterns:
        pattern = written.removeprefix("network.")
        if pattern.startswith("re:"):
            matches = [name for name in names if re.fullmatch(pattern[3:], name)]
        else:
            matches = [name for name in names if types[name] == pattern or fnmatchcase(name, pattern)]
        chosen.update(matches or match(names, [pattern], option))
    return [name for name in names if name in chosen]


def only_matched(
    layers: Mapping[str, nn.Module], special: Sequence[str], patterns: Sequence[str]
) -> set[str]:
    """Those of the `special` layers that a pattern asks for which matches nothing but special ones."""
    types = {name: type(layer).__name__ for name, layer in layers.items()}
    asked: set[str] = set()
    for pattern in patterns if special else ():
        chosen = set(matching(layers, [pattern], types, "targets"))
        if chosen <= set(special):
            asked |= chosen
    return asked


def assigned(
    types: Mapping[str, str],
    scheme: AnyScheme,
    targets: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    overrides: Overrides | None = None,
) -> dict[str, AnyScheme]:
    """The scheme of everything that is quantized, in the order of `types`.

    Args:
        types: `{name: class name}` of the candidates.
        scheme: what holds where nothing else is said.
        targets: which of the candidates, see `matching`.
        ignore: which of these not.
        overrides: `{pattern: {option of the scheme: value}}`; later ones win.

    Raises:
        OptionError: a pattern matches nothing, an option is unknown or out of range, or nothing is left.
    """
    chosen = matching(types, targets, types, "targets")
    left_out = set(matching(types, ignore, types, "ignore"))
    schemes = {name: scheme for name in chosen if name not in left_out}
    known = {field.name for field in fields(scheme)}
    for pattern, options in (overrides or {}).items():
        unknown = sorted(set(options) - known)
        if unknown:
            raise OptionError(
                f"overrides['{pattern}']: {', '.join(unknown)} is none of {', '.join(sorted(known))}."
            )
        for name in matching(schemes, [pattern], types, "overrides"):
            schemes[name] = replace(schemes[name], **options)
    schemes = {name: resolved for name, resolved in schemes.items() if resolved.active}
    if not schemes:
        raise OptionError("No layer is left to quantize: see targets, ignore and overrides.")
    return schemes


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
        OptionError: a pattern matches nothing, an option is unknown or out of range, or a group size does not
            divide the inputs of some layers, which are listed.
    """
    types = {name: type(layer).__name__ for name, layer in layers.items()}
    schemes = assigned(types, scheme, targets, ignore, overrides)
    wrong = [
        f"{name} (group_size {resolved.group_size}, d_in {columns_of(layers[name])})"
        for name, resolved in schemes.items()
        if resolved.bits < 16 and resolved.group_size != -1 and columns_of(layers[name]) % resolved.group_size
    ]
    if wrong:
        raise OptionError(
            f"group_size must divide the number of inputs; it does not in {len(wrong)} layers: "
            f"{', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''}."
        )
    return schemes


def columns_of(layer: nn.Module) -> int:
    """d_in of a linear layer."""
    weight = layer.get_parameter("weight")
    return weight.shape[0] if isinstance(layer, Conv1D) else weight.shape[1]
