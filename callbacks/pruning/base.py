"""PruningCallback: masks over a run. What a pruning method adds is when and how they change."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.pruning.masks import MaskBook
from callbacks.pruning.report import draw_run, report_of
from callbacks.pruning.schedules import Timetable
from callbacks.pruning.state import PruningState, changed_settings
from callbacks.pruning.tensors import owning_optimizer, prunable_modules
from callbacks.pruning.weights import PrunedWeights, averaged_modules
from callbacks.run.directory import run_directory
from lightning_modules.parts.options import check_range
from lightning_modules.parts.strategies import is_sharded


class PruningCallback(Callback, ABC):
    """Keeps masks over the weights of conv and linear layers, and changes them on a timetable.

    A subclass says when (`timetable`), how the masks start (`start`), and how an update changes them
    (`update`). This class selects the weights, finds their optimiser, counts its steps, and after each of
    them holds the weights and the optimiser's states at exactly zero where a mask is; averaged weights (EMA,
    SWA) follow. Masks are saved and restored with everything that the schedule needs: an interrupted run ends
    as an uninterrupted one. `fit` ends with two pictures in the run directory, `test` with a part of
    `results.json`.

    Args:
        target_sparsity: share of zeros among the selected weights at the end, in [0, 1); 0 does nothing.
        update_every: optimiser steps between two updates of the masks.
        modules: types of layers in `torch.nn` whose weight is pruned.
        include: globs over module paths (`network.layer*.conv?`); None takes all layers of these types.
        exclude: globs over module paths that stay dense.
        sync_masks: send the masks of process 0 to all after every update; they agree anyway on equal
            hardware.
        report_ranks: decompose every layer for the report at the end.
        total_steps: optimiser steps of the run; None asks the Trainer. Needed where the optimiser of the
            pruned weights does not step on every batch (manual optimisation).
    """

    name = "pruning"  # of its part in results.json
    log_as: ClassVar[str] = "pruning"

    def __init__(
        self,
        target_sparsity: float,
        update_every: int = 100,
        modules: Sequence[str] = ("Conv2d", "Linear"),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        sync_masks: bool = True,
        report_ranks: bool = True,
        total_steps: int | None = None,
    ) -> None:
        check_range("target_sparsity", target_sparsity, "[0, 1)")
        check_range("update_every", update_every, "[1, inf)")
        if total_steps is not None:
            check_range("total_steps", total_steps, "[1, inf)")
        self.target_sparsity = target_sparsity
        self.update_every = update_every
        self.modules = list(modules)
        self.include = None if include is None else list(include)
        self.exclude = None if exclude is None else list(exclude)
        self.sync_masks = sync_masks
        self.report_ranks = report_ranks
        self.total_steps = total_steps
        self._selected = PrunedWeights({})
        self._state: PruningState | None = None  # of the run, from the start of the training
        self._saved: dict[str, Any] | None = None  # to go on with
        self._earlier: dict[str, Any] | None = None  # of an earlier fit
        self._finished_step = 0
        self._warned_postponed = False

    # What a method fills in

    @abstractmethod
    def timetable(self, total_steps: int) -> Timetable:
        """When the masks change, for a run of `total_steps`; raises where the run is too short."""

    def start(self) -> None:
        """Set the masks before the first step; here: everything is alive."""

    @abstractmethod
    def update(self, due: int, gradients: dict[str, Tensor]) -> bool:
        """Change the masks; called with the dense gradients of this step, before the optimiser uses them.

        Args:
            due: the step at which this update was due (an update waits for finite gradients).
            gradients: dense, by weight name, in the parameters' `.grad`; may be changed in place. Weights
                that the loss did not use this time are missing.

        Returns:
            True if the optimiser is to skip this step.
        """

    def between_updates(self, gradients: dict[str, Tensor]) -> None:
        """Called in place of `update` at every other step; here: nothing."""

    def drop_fraction_now(self) -> float:
        """Share of a layer's weights that moves at the present step; for logs and plots."""
        return 0.0

    def log_values(self) -> dict[str, float]:
        """Further numbers to log after each step."""
        return {}

    def target_density(self) -> float:
        """Density of all selected weights at the end; larger where a distribution keeps layers dense."""
        return self.final_density

    def configuration(self) -> dict[str, Any]:
        """What the schedule depends on, as plain values; compared on resume."""
        return {"target_sparsity": self.target_sparsity, "update_every": self.update_every}

    # For the methods

    @property
    def state(self) -> PruningState:
        """Masks, timetable and counters of the run.

        Raises:
            MisconfigurationException: training has not started yet.
        """
        if self._state is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no masks before training has started."
            )
        return self._state

    @property
    def masks(self) -> MaskBook:
        """The masks of the run."""
        return self.state.masks

    @property
    def plan(self) -> Timetable:
        """The timetable of the run."""
        return self.state.plan

    @property
    def step(self) -> int:
        """Of the weights' optimiser, the present one included; 0 before training."""
        return 0 if self._state is None else self._state.step

    @property
    def settled(self) -> bool:
        """Whether the target density has been reached once."""
        return self._state is not None and self._state.settled

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that are pruned, by name."""
        return self._selected.parameters

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules of `weights`, by the same names."""
        return self._selected.layers

    @property
    def final_density(self) -> float:
        """`1 - target_sparsity` in decimal: 0.2 for 0.8, not the 0.19999... that costs ERK a weight."""
        return round(1 - self.target_sparsity, 12)

    # Start of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Select the weights, in `fit` only."""
        if stage != "fit":
            return
        if is_sharded(trainer.strategy):
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole weights, and {type(trainer.strategy).__name__} shards "
                "them: use strategy ddp, or one device."
            )
        self._earlier = self.state_dict() or None
        self._state = self._saved = None
        self._finished_step = 0
        self._warned_postponed = False
        if not is_overridden("configure_model", pl_module):
            self._collect(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the weights of a module that makes its layers in `configure_model`, after `setup`."""
        if is_overridden("configure_model", pl_module):
            self._collect(pl_module)

    def _collect(self, pl_module: LightningModule) -> None:
        selected = PrunedWeights(prunable_modules(pl_module, self.modules, self.include, self.exclude))
        if self._saved is None and selected.same_as(self._selected):
            self._saved = self._earlier  # a second `fit` of the same weights goes on with its masks
        self._earlier = None
        self._selected = selected

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make or restore timetable and masks; by now everything else is restored."""
        self._refuse_overlap(trainer)
        if self.target_sparsity == 0:
            rank_zero_warn(f"{type(self).__name__}: target_sparsity is 0, so nothing is pruned.")
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(
                f"{type(self).__name__}: fast_dev_run is too short to prune in, so nothing is pruned."
            )
            return
        optimizer = owning_optimizer(trainer.optimizers, self.weights)
        if self._saved is None:
            self._state = PruningState(MaskBook(self.weights), self.timetable(self._run_length(trainer)))
            self.start()
            self.state.note(self.masks.density(), 0.0)
        else:
            self._restore(self._saved, trainer)
        self._apply(optimizer, trainer)

    def _run_length(self, trainer: Trainer) -> int:
        if self.total_steps is not None:
            return self.total_steps
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise MisconfigurationException(
                f"{type(self).__name__} needs an end to plan for: set trainer.max_epochs or "
                "trainer.max_steps."
            )
        return int(steps)

    def _refuse_overlap(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PruningCallback) and other is not self:
                shared = self._selected.shared_with(other._selected)
                if shared:
                    raise MisconfigurationException(
                        f"{type(self).__name__} and {type(other).__name__} both prune "
                        f"{', '.join(shared[:4])}: give them different layers with include or exclude."
                    )

    # A step

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Update the masks where one is due, and keep the optimiser to the weights that are alive.

        Runs once a real step, after unscaling and the average over processes, before clipping.
        """
        state = self._state
        if state is None or not self._selected.owned_by(optimizer):
            return
        state.step += 1
        if state.plan.is_due(state.step):
            state.due = state.step
        if state.due is not None and self._can_update():
            due, state.due = state.due, None
            if self._update(due, optimizer, trainer):
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
        else:
            self.between_updates(self._selected.gradients())
        state.masks.apply_to_gradients(self.weights)

    def _can_update(self) -> bool:
        finite = self._selected.has_finite_gradients()
        if finite is False and not self._warned_postponed:
            self._warned_postponed = True
            rank_zero_info(
                f"{type(self).__name__}: gradients are not finite at step {self.step}; the update of the "
                "masks waits for the next step. Later occurrences are not reported."
            )
        return bool(finite)

    def _update(self, due: int, optimizer: Optimizer, trainer: Trainer) -> bool:
        before = self.masks.counts()
        skip = self.update(due, self._selected.gradients())
        if self.sync_masks:
            self.masks.synchronize()
        self._apply(optimizer, trainer)
        after = self.masks.counts()
        emptied = [name for name, count in after.items() if count == 0 and before[name] > 0]
        if emptied:
            rank_zero_warn(f"{type(self).__name__}: no weight is left in {', '.join(emptied)}.")
        self.state.note(sum(after.values()) / self.masks.total, self.drop_fraction_now())
        return skip

    def _apply(self, optimizer: Optimizer, trainer: Trainer) -> None:
        """Zero what the masks say: weights, optimiser states, averaged weights."""
        self._selected.clear(self.masks, averaged_modules(trainer))
        self.masks.apply_to_states(self.weights, optimizer)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold weights and optimiser states at zero after a step, and log."""
        state = self._state
        if state is None or state.step == self._finished_step:
            return  # gradients are still being accumulated
        self._finished_step = state.step
        state.masks.apply(self.weights)
        for optimizer in trainer.optimizers:
            if self._selected.owned_by(optimizer):
                state.masks.apply_to_states(self.weights, optimizer)
        values = {"density": state.history[-1][1]} | self.log_values()
        pl_module.log_dict({f"{self.log_as}/{key}": value for key, value in values.items()}, batch_size=1)

    # Checks and the end

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check that what is evaluated is what the masks say: swapped-in averages, too.

        Raises:
            RuntimeError: a masked weight is not zero; names the layers.
        """
        if self._state is None or batch_idx > 0 or dataloader_idx > 0 or trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            return
        violations = self.masks.violations(self.weights)
        if violations:
            raise RuntimeError(
                f"{type(self).__name__}: masked weights are not zero in {', '.join(violations)}. Something "
                "changed them outside of the optimiser's step."
            )

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave true zeros, compare the density with the target, draw the pictures."""
        if self._state is None:
            return
        self._selected.clear(self.masks, averaged_modules(trainer))
        density, target = self.masks.density(), self.target_density()
        # one weight a layer for rounding down, and the one of the global threshold
        if abs(density - target) * self.masks.total > len(self.masks) + 1:
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {self.step} of {self.plan.total_steps} with "
                f"density {density:.6f}; the target was {target:.6f}."
            )
        if trainer.is_global_zero:
            label, steps = run_directory(trainer) / self._label(trainer), self.plan.total_steps
            try:
                draw_run(label, self._state.history, target, steps, self.weights, self.report_ranks)
            except OSError as error:  # a full disk must not cost the run
                rank_zero_warn(f"{type(self).__name__} could not write its pictures: {error}.")

    def _label(self, trainer: Trainer) -> str:
        """`pruning`, and `pruning_2` for a second pruning callback, as in `results.json`."""
        ours = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]
        number = ours.index(self) + 1
        return self.name if number == 1 else f"{self.name}_{number}"

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Sparsity of the module as it is, in total and for each layer; empty where none is selected."""
        try:
            layers = prunable_modules(module, self.modules, self.include, self.exclude)
        except (ValueError, MisconfigurationException):
            return {}
        method = {"method": type(self).__name__, "target_sparsity": self.target_sparsity}
        return method | report_of(PrunedWeights(layers).parameters, self.report_ranks)

    # Checkpoints

    @property
    def state_key(self) -> str:
        """Apart for callbacks on different layers of one run."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        """Masks as packed bits, counters, timetable, configuration; empty before training."""
        return {} if self._state is None else self._state.as_dict(self.configuration())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._saved = state_dict or None

    def _restore(self, saved: dict[str, Any], trainer: Trainer) -> None:
        self._state = PruningState.from_dict(saved, self.weights)
        self._finished_step = self._state.step
        changed = changed_settings(saved, self.configuration(), self._run_length(trainer))
        for option, value in saved["configuration"].items():
            setattr(self, option, value)
        if changed:
            rank_zero_warn(
                f"{type(self).__name__} goes on with the schedule of the checkpoint; these settings differ "
                f"and are not used: {', '.join(changed)}."
            )
