"""What the options of a token reduction callback mean for the module at hand."""

from typing import TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Value = TypeVar("Value")


def find_transformer(module: nn.Module, target: str | None) -> VisionTransformer:
    """The timm VisionTransformer at `target`, or the only one in `module`.

    Raises:
        MisconfigurationException: nothing at `target`, something else there, none at all, or several and no
            `target`.
    """
    found = {path: part for path, part in module.named_modules() if isinstance(part, VisionTransformer)}
    listed = ", ".join(
        f"{path or 'the module itself'} ({type(part).__name__})" for path, part in found.items()
    )
    owner = type(module).__name__
    if target is not None:
        if target in found:
            return found[target]
        raise MisconfigurationException(
            f"target={target!r} is no timm VisionTransformer. In {owner} there are: {listed or 'none'}."
        )
    if not found:
        raise MisconfigurationException(
            f"Token reduction acts on a timm VisionTransformer; {owner} has none."
        )
    if len(found) > 1:
        raise MisconfigurationException(
            f"Token reduction acts on one VisionTransformer; {owner} has several, choose a target: {listed}."
        )
    return next(iter(found.values()))


def spread(option: str, value: Value | list[Value], count: int) -> list[Value]:
    """One value for each compressing block.

    Raises:
        ValueError: a list of another length; names the option.
    """
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{option} lists {len(value)} values ({value}), and there are {count} compressing blocks: "
            "give one value for all, or one for each."
        )
    return value
