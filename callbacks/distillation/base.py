"""Teacher: what all distillation teachers share, whatever they teach."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from callbacks.objective import ObjectiveCallback
from lightning_modules.parts.finite import FiniteGuard
from lightning_modules.parts.frozen import FrozenNetwork, weights_digest

Answer = TypeVar("Answer")


class FrozenTeacher(FrozenNetwork):
    """A teacher, outside of every module tree, that answers each batch once however many callbacks ask.

    Args:
        network: what is asked.
        name: of the architecture, for messages and checkpoints.
        gives: what comes out of it, for messages.
    """

    def __init__(self, network: nn.Module, name: str, gives: str = "logits") -> None:
        super().__init__(network)
        self.name = name
        self.gives = gives
        self.digest = weights_digest(network)
        self._finite = FiniteGuard()
        self._batch: Tensor | None = None
        self._features: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass in inference mode, under the run's autocast; what comes out is watched, see `verify`.

        Returns:
            Copies that autograd may save: a tensor, or the tensors by name.
        """
        with torch.inference_mode():
            outputs = super().__call__(*args, **kwargs)
        named = outputs if isinstance(outputs, Mapping) else {self.gives: outputs}
        copies = {name: tensor.clone() for name, tensor in named.items() if isinstance(tensor, Tensor)}
        floating = {name: tensor for name, tensor in copies.items() if tensor.is_floating_point()}
        self._finite.watch({name: t.abs().amax() for name, t in floating.items() if t.numel()}, 0, self.name)
        return copies if isinstance(outputs, Mapping) else copies[self.gives]

    def once(self, batch: Tensor, compute: Callable[[], Answer]) -> Answer:
        """What `compute` gives for `batch`; the same tensor asked again is not computed again."""
        if self._batch is not batch or self._features is None:
            self._features, self._batch = compute(), batch
        return self._features

    def verify(self, step: int) -> None:
        """Refuse the last answer if it is not finite; the device is waited for only now.

        Raises:
            RuntimeError: names the teacher and the step.
        """
        try:
            self._finite.verify()
        except RuntimeError as error:
            raise RuntimeError(
                f"The teacher {self.name} gave non-finite {self.gives} at step {step}."
            ) from error

    def forget(self) -> None:
        """Release the last batch and the answer."""
        self._batch = self._features = None


class Teacher(ObjectiveCallback):
    """Brings a frozen teacher into a run, and takes it out again.

    The teacher is built once (callbacks that name the same one share it, and its answers), without a trace in
    the random state; kept in eval mode; moved to the run's device and precision for the time of a `fit`;
    watched for values that are not finite; compared with the checkpoint's on resume; and its last batch is
    let go after every step and after an exception.

    A child says what a student is, how its teacher is built and from what, and, as every
    `ObjectiveCallback`, the objective: an `nn.Module` that asks `self.frozen` and does not own it.

    Args:
        name: of the objective.
        optimizer: which of an alternating method's optimisers learns from the teacher, see
            `ObjectiveCallback`.
    """

    def __init__(self, name: str, optimizer: str | None = None) -> None:
        super().__init__(name, optimizer)
        self._frozen: FrozenTeacher | None = None

    # What a child fills in

    @abstractmethod
    def student(self, module: LightningModule) -> nn.Module:
        """The network that learns.

        Raises:
            MisconfigurationException: the module is none that this teacher can teach.
        """

    @abstractmethod
    def build_teacher(self, module: LightningModule) -> FrozenTeacher:
        """The teacher, loaded, on the CPU."""

    @property
    @abstractmethod
    def source(self) -> tuple[Any, ...]:
        """What the teacher is built from: callbacks of one class with equal sources share it."""

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must share with the interrupted one, beside teacher and weights."""
        return {}

    # The run

    @property
    def frozen(self) -> FrozenTeacher:
        """The teacher, once `setup` has built it.

        Raises:
            RuntimeError: it has not.
        """
        if self._frozen is None:
            raise RuntimeError(f"{type(self).__name__}[{self.name}] has no teacher before `setup`.")
        return self._frozen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build what is not built yet, in `fit`."""
        if stage == "fit":
            self.student(pl_module)
            with torch.random.fork_rng(devices=[]):  # nobody else's draws may depend on the teacher
                if self._frozen is None:
                    self._frozen = self._shared_teacher(trainer) or self.build_teacher(pl_module)
                super().setup(trainer, pl_module, stage)

    def _shared_teacher(self, trainer: Trainer) -> FrozenTeacher | None:
        for other in getattr(trainer, "callbacks", []):
            if type(other) is type(self) and other._frozen is not None and other.source == self.source:
                rank_zero_info(f"'{self.name}' and '{other.name}' share the teacher {other.frozen.name}.")
                return other._frozen
        return None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the teacher to the run's device and precision."""
        student = self.student(pl_module)
        dtype = next((p.dtype for p in student.parameters() if p.is_floating_point()), None)
        self.frozen.to(pl_module.device, dtype)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The teacher must still be in eval mode.

        Raises:
            RuntimeError: something has put it in training mode.
        """
        if any(module.training for module in self.frozen.network.modules()):
            raise RuntimeError(f"The teacher {self.frozen.name} was put in training mode.")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the optimiser uses what a broken teacher said."""
        self.frozen.verify(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Release the batch."""
        self.forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing of the batch behind."""
        self.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the objective, and take the teacher off the device."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self.forget()
            if self._frozen is not None:
                self._frozen.to("cpu")

    def forget(self) -> None:
        """Release what was kept of the last batch."""
        if self._frozen is not None:
            self._frozen.forget()

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share: teacher, weights, and the settings."""
        if self._frozen is None:
            return {}
        return {"teacher": self._frozen.name, "digest": self._frozen.digest, **self.settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the interrupted run.

        Raises:
            ValueError: teacher, weights or settings differ; names both.
        """
        ours = self.state_dict()
        for key, saved in state_dict.items():
            if ours and ours.get(key) != saved:
                raise ValueError(
                    f"{type(self).__name__}[{self.name}]: the checkpoint was trained with {key} {saved}, "
                    f"this run has {key} {ours.get(key)}. Resume with the same, or start anew from its "
                    "weights."
                )
