"""The outputs of named submodules, recorded during a forward pass."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_modules.parts.selection import match


class FeatureTaps:
    """Records the outputs of named submodules during a forward pass, by forward hooks.

    Example:
        >>> taps = FeatureTaps(network, ["layer1", "layer4"])
        >>> network(images)
        >>> taps.outputs["layer4"].shape
        >>> taps.remove()

    Args:
        root: paths are relative to it.
        paths: module paths or globs, see `lightning_modules.parts.selection.match`.
    """

    def __init__(self, root: nn.Module, paths: Iterable[str]) -> None:
        modules = dict(root.named_modules())
        self.paths = match([path for path in modules if path], list(paths), "feature taps")
        self.outputs: dict[str, Tensor] = {}
        self._handles = [modules[path].register_forward_hook(self._record(path)) for path in self.paths]

    def _record(self, path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            # gradient checkpointing runs a block twice: the first output is the one that the loss saw
            self.outputs.setdefault(path, output)

        return hook

    def clear(self) -> None:
        """Forget the outputs; call it after every use, so that no graph outlives its step."""
        self.outputs = {}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()
