"""The outputs of named submodules, recorded during a forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

from torch import Tensor, is_grad_enabled, nn

from lightning_modules.parts.selection import match


class FeatureTaps:
    """Records the outputs (or inputs) of named submodules during a forward pass, by forward hooks.

    The first output of a submodule counts: blocks that gradient checkpointing runs again in the backward pass
    are not recorded twice. Copies of the network (weight averaging) carry the hooks but record nothing.

    Example:
        >>> taps = FeatureTaps(network, ["layer1", "layer4"])
        >>> network(images)
        >>> taps.outputs["layer4"].shape
        >>> taps.remove()

    Args:
        root: paths are relative to it.
        paths: module paths or globs, see `lightning_modules.parts.selection.match`; `tap` adds others.
        each_pass: forget what was recorded whenever the root's own forward starts, and record inside of it
            only; otherwise whatever comes first after `clear` stays.
        training_only: with `each_pass`, record only in training mode with gradients, so that validation
            costs nothing.
        option: how the user calls the paths, for messages.
    """

    def __init__(
        self,
        root: nn.Module,
        paths: Iterable[str] = (),
        each_pass: bool = False,
        training_only: bool = False,
        option: str = "feature taps",
    ) -> None:
        self.training_only = training_only
        self.outputs: dict[str, Tensor] = {}
        self.paths = match([path for path, _ in root.named_modules() if path], list(paths), option)
        self._root = root
        self._keys: set[str] = set()
        self._recording = not each_pass
        self._each_pass = each_pass
        self._handles = [root.register_forward_pre_hook(self._start())] if each_pass else []
        for path in self.paths:
            self.tap(path)

    def tap(self, path: str, key: str | None = None, takes_input: bool = False) -> None:
        """Record one more submodule, once.

        Args:
            path: of the submodule.
            key: in `outputs`; None is the path.
            takes_input: record what enters the submodule, its first argument.
        """
        name = path if key is None else key
        if name in self._keys:
            return
        self._keys.add(name)
        module = self._root.get_submodule(path)
        expected = ref(module)

        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            if self._recording and module is expected():
                self.outputs.setdefault(name, arguments[0] if takes_input else output)

        self._handles.append(module.register_forward_hook(hook))

    def _start(self) -> Callable[[nn.Module, tuple], None]:
        expected = ref(self._root)

        def hook(module: nn.Module, arguments: tuple) -> None:
            if module is expected():
                self.outputs = {}
                self._recording = not self.training_only or (module.training and is_grad_enabled())

        return hook

    def take(self) -> dict[str, Tensor]:
        """What was recorded; it is forgotten here.

        Raises:
            RuntimeError: the network did not run, or not through all the modules that are tapped.
        """
        recorded = self.outputs
        self.clear()
        lost = sorted(self._keys - set(recorded))
        if lost:
            raise RuntimeError(f"the last forward pass gave no {', '.join(lost)}.")
        return recorded

    @contextmanager
    def always(self) -> Iterator[None]:
        """Record in evaluation mode too."""
        before, self.training_only = self.training_only, False
        try:
            yield
        finally:
            self.training_only = before

    def clear(self) -> None:
        """Forget the outputs; call it after every use, so that no graph outlives its step."""
        self.outputs, self._recording = {}, not self._each_pass

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "FeatureTaps":
        return self
