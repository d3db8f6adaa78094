"""One vocabulary for naming layers and parameters: module paths with globs, plus a type filter."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lightning_modules.parts.options import OptionError


def match(names: Iterable[str], patterns: Sequence[str], option: str) -> list[str]:
    """Names that match at least one glob, in the order of `names`.

    Args:
        names: dotted paths of modules or parameters.
        patterns: shell globs; `*` also crosses dots, so `network.layer*.conv?` finds
            `network.layer1.0.conv2`.
        option: how the user calls this list of patterns, for the error message.

    Raises:
        OptionError: a pattern matches nothing; the message lists near misses.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise OptionError(
                f"{option}: the pattern '{pattern}' matches nothing. {_near_misses(names, pattern)}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def select_modules(
    root: nn.Module,
    patterns: Sequence[str] = ("*",),
    types: tuple[type[nn.Module], ...] | None = None,
    option: str = "layers",
) -> dict[str, nn.Module]:
    """Submodules of `root` by path glob and type, `{path: module}` in module order.

    Args:
        root: paths are relative to it; the root itself has no path and is never selected.
        patterns: globs over module paths, see `match`.
        types: keep only instances of these; None keeps every type.
        option: how the user calls the patterns, for the error message.

    Raises:
        OptionError: a pattern matches no module (of the wanted types); near misses, or the types seen, are
            listed.
    """
    modules = {name: module for name, module in root.named_modules() if name}
    typed = {name: module for name, module in modules.items() if types is None or isinstance(module, types)}
    if types is not None and not typed:
        seen = sorted({type(module).__name__ for module in modules.values()})
        wanted = ", ".join(kind.__name__ for kind in types)
        raise OptionError(f"{option}: no module of type {wanted}; the types seen are {', '.join(seen)}.")
    return {name: typed[name] for name in match(typed, patterns, option)}


def _near_misses(names: list[str], pattern: str) -> str:
    close = get_close_matches(pattern, names, n=4, cutoff=0.5)
    if close:
        return f"Near misses: {', '.join(close)}."
    shown = ", ".join(names[:6]) or "none at all"
    return f"Names there are: {shown}{', ...' if len(names) > 6 else '.'}"
