"""Method: what every training method shares, so that a method's own file holds only the method."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.parts.averaging import average_weights_only
from lightning_modules.parts.contracts import HasRoot, datamodule_of, optional
from lightning_modules.parts.finite import FiniteGuard, verify_outputs
from lightning_modules.parts.logging import log_in_place
from lightning_modules.parts.modes import train_what_is_trained
from lightning_modules.parts.names import compare_names, names_of
from lightning_modules.parts.optimizers import SavedOptimizer, optimizer_fault, saved_optimizers
from lightning_modules.parts.reproducibility import seed_step
from lightning_modules.parts.schedules import WarmupSchedule, fixed_length
from lightning_modules.parts.selection import match
from lightning_modules.parts.weights import state_fault

Terms: TypeAlias = dict[str, Tensor]
log_in_place()


class Method(LightningModule):
    """A LightningModule with named losses, attachable objectives, optimiser groups and clean checkpoints.

    A method fills in `compute` and `losses`. The loss of a step is the sum of its own terms and of those of
    every attached objective; each is logged as `train/<term>` or `train/<objective>/<term>`. A method with
    alternating optimisers sets `automatic_optimization = False`, names them in `optimizer_names`, overrides
    `training_step`, and still uses `total_loss`, `parameter_groups` and `schedule`. What `validation_step`
    and `test_step` measure they also return, as named tensors: a NaN among them ends the run.

    Every training step starts from random state seeded by (seed, epoch, batch, rank), so that a resumed run
    draws the numbers that the uninterrupted one would have drawn.

    `weights_origin` says where the weights are from, for reports: `random` (also with what follows, such as
    `random head on pretrained: resnet18`) until something was loaded or trained, then `pretrained: NAME`,
    `file: PATH`, `checkpoint` or `trained`. A method that loads weights in its constructor says so there.

    Args:
        optimizer: any torch or timm optimiser class with its arguments; None is AdamW at 1e-3. (A class as
            the default would pass its arguments on to the class that a user chooses on the command line.)
        lr_scheduler: any torch scheduler, or `WarmupSchedule` for timm's; None keeps the rate constant.
        lr_interval: when a torch scheduler steps (`WarmupSchedule` says so itself).
        lr_multipliers: `{glob over parameter names: factor of the learning rate}`; the last glob that
            matches wins.
        no_decay: globs over parameter names that get no weight decay.
        decay_1d: False leaves one-dimensional parameters (norms, biases) without weight decay, as timm does.

    Attributes:
        optimizer_names: of the optimisers of a method that alternates between several; an objective says
            which of them it is for.
    """

    optimizer_names: tuple[str, ...] = ()
    metrics: ClassVar[tuple[str, ...]] = ()
    """What is computed of the tensors that `validation_step` and `test_step` return, for messages."""

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_multipliers: dict[str, float] | None = None,
        no_decay: list[str] | None = None,
        decay_1d: bool = True,
    ) -> None:
        super().__init__()
        self.optimizer: OptimizerCallable = optimizer or partial(torch.optim.AdamW, lr=1e-3)
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr_multipliers = lr_multipliers or {}
        self.no_decay = no_decay or []
        self.decay_1d = decay_1d
        self.objectives = nn.ModuleDict()
        self._objective_optimizers: dict[str, str | None] = {}
        self.weights_origin = "random"
        self.class_names: list[str] | None = None  # of the data that a loaded checkpoint was trained on
        self._finite = FiniteGuard()
        self._saved_optimizers: list[SavedOptimizer] | None = None
        self._saved_schedules: int | None = None

    # What a method fills in

    def augment(self, batch: Any) -> Any:
        """Change a training batch on the device before anything sees it (mixup, erasing); here not at all."""
        return batch

    def compute(self, batch: Any) -> dict[str, Tensor]:
        """Forward pass: named outputs that `losses` and the objectives read."""
        raise MisconfigurationException(f"{type(self).__name__} must define `compute(batch)`.")

    def losses(self, outputs: dict[str, Tensor], batch: Any) -> Terms:
        """Named, weighted scalar terms of the method's own loss."""
        raise MisconfigurationException(f"{type(self).__name__} must define `losses(outputs, batch)`.")

    # The run

    def configure_callbacks(self) -> list[Callback]:
        """Add none; make those that average weights average nothing else."""
        average_weights_only(self.trainer)
        return []

    def on_fit_start(self) -> None:
        """Train in training mode, whichever mode the network came in; refuse another optimiser's checkpoint.

        Raises:
            MisconfigurationException: the checkpoint that is resumed has other optimisers or schedules.
        """
        train_what_is_trained(self)
        saved, self._saved_optimizers = self._saved_optimizers, None
        if saved is not None and (fault := optimizer_fault(saved, self.trainer.optimizers)):
            raise MisconfigurationException(
                f"The checkpoint '{self.trainer.ckpt_path}' was written with another optimizer: {fault}. "
                "Resume with the same `model.init_args.optimizer`, or start from its weights alone "
                "(`model.init_args.weights`)."
            )
        schedules, self._saved_schedules = self._saved_schedules, None
        if schedules is not None and schedules != len(self.trainer.lr_scheduler_configs):
            raise MisconfigurationException(
                f"The checkpoint '{self.trainer.ckpt_path}' was written with {schedules} learning rate "
                f"schedules, and this run has {len(self.trainer.lr_scheduler_configs)}. Resume with the same "
                "`model.init_args.lr_scheduler`, or start from its weights alone (`model.init_args.weights`)."
            )

    # The step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step, see the class docstring."""
        seed_step(self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Augment, compute, sum every term, log them."""
        batch = self.augment(batch)
        outputs = self.compute(batch)
        return self.total_loss(outputs, batch, batch_idx)

    def total_loss(
        self, outputs: dict[str, Tensor], batch: Any, batch_idx: int, optimizer: str | None = None
    ) -> Tensor:
        """Sum of the method's terms and of the objectives', logged and watched for non-finite values.

        Args:
            outputs: of `compute`.
            batch: that they are of.
            batch_idx: its number.
            optimizer: the one of `optimizer_names` that will step; only objectives for it take part.
        """
        terms = dict(self.losses(outputs, batch))
        for name, objective in self.objectives_for(optimizer).items():
            terms.update({f"{name}/{term}": value for term, value in objective(self, batch, outputs).items()})
        if not terms:
            raise MisconfigurationException(
                f"{type(self).__name__} has no loss term and no objective is attached."
            )
        loss = torch.stack([value.float() for value in terms.values()]).sum()
        self._finite.watch(terms, batch_idx, self._data_source())
        values = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(values, batch_size=1)  # one value a step: the batch size weighs nothing
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def on_after_backward(self) -> None:
        """Stop before a non-finite loss reaches the weights."""
        self._finite.verify()

    def on_train_end(self) -> None:
        """Whatever the weights were, they are trained now."""
        if self.trainer.global_step:
            self.weights_origin = "trained"

    def _data_source(self) -> str:
        datamodule = datamodule_of(self.trainer)
        if datamodule is None:
            return "the given data loader"
        data = optional(datamodule, HasRoot)
        return f"{type(datamodule).__name__} ({'no root' if data is None else data.root})"

    # Evaluation

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop at what is not a number in the tensors that `validation_step` returns by name."""
        verify_outputs(outputs, "val", batch_idx, self._data_source(), self.metrics)

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop at what is not a number in the tensors that `test_step` returns by name."""
        verify_outputs(outputs, "test", batch_idx, self._data_source(), self.metrics)

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop at what is not a number in the tensors that `predict_step` returns by name."""
        verify_outputs(outputs, "predict", batch_idx, self._data_source())

    # Objectives

    def attach_objective(self, name: str, objective: nn.Module, optimizer: str | None = None) -> None:
        """Add `objective(module, batch, outputs) -> {term: weighted scalar}` to the training loss.

        Its parameters and buffers become part of the module: optimised, checkpointed, synchronised.

        Args:
            name: of the objective.
            objective: what gives the terms.
            optimizer: which of `optimizer_names` it is for; None in a method with one optimiser.

        Raises:
            MisconfigurationException: the name is taken, or has a dot or slash, or the method has no such
                optimiser.
        """
        if optimizer not in (self.optimizer_names or (None,)):
            has = ", ".join(self.optimizer_names) or "one without a name"
            raise MisconfigurationException(
                f"The objective '{name}' is for the optimiser {optimizer}, and those of "
                f"{type(self).__name__} are: {has}. Give the objective the `optimizer` that it is for."
            )
        if name in self.objectives:
            raise MisconfigurationException(
                f"An objective named '{name}' is attached already: give each its `name`."
            )
        if "." in name or "/" in name or not name:
            raise MisconfigurationException(
                f"objective name '{name}': must be non-empty, without '.' and '/'."
            )
        self.objectives[name] = objective
        self._objective_optimizers[name] = optimizer

    def objectives_for(self, optimizer: str | None) -> dict[str, nn.Module]:
        """The attached objectives that are for an optimiser, by name."""
        return {
            name: objective
            for name, objective in self.objectives.items()
            if self._objective_optimizers.get(name) == optimizer
        }

    def detach_objective(self, name: str) -> None:
        """Remove an attached objective; unknown names are ignored."""
        if name in self.objectives:
            del self.objectives[name]

    # Optimiser and schedule

    def configure_optimizers(self) -> Any:
        """One optimiser over all trainable parameters in groups, and its schedule."""
        optimizer = self.build_optimizer(self.optimizer, self.named_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, self.lr_scheduler)}

    def build_optimizer(
        self, factory: OptimizerCallable, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> Optimizer:
        """`factory` over `parameter_groups`, with the rate of each group multiplied by its factor."""
        groups = self.parameter_groups(parameters)
        factors = [group.pop("lr_factor") for group in groups]
        optimizer = factory(groups)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = group["lr"] * factor
        return optimizer

    def parameter_groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Trainable parameters grouped by (learning-rate factor, weight decay or none).

        Args:
            parameters: named parameters; frozen ones are left out.

        Returns:
            Groups with `params`, `lr_factor`, and `weight_decay: 0` where decay is off.

        Raises:
            ValueError: a glob of `lr_multipliers` or `no_decay` matches nothing.
            MisconfigurationException: nothing is trainable.
        """
        trainable = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        if not trainable:
            raise MisconfigurationException(f"{type(self).__name__} has no trainable parameter to optimise.")
        factors = dict.fromkeys(trainable, 1.0)
        for glob, factor in self.lr_multipliers.items():
            factors.update(dict.fromkeys(match(trainable, [glob], "lr_multipliers"), factor))
        exempt = set(match(trainable, self.no_decay, "no_decay"))
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in trainable.items():
            decayed = name not in exempt and (self.decay_1d or parameter.ndim > 1)
            group = groups.setdefault((factors[name], decayed), {"params": [], "lr_factor": factors[name]})
            group["params"].append(parameter)
            if not decayed:
                group["weight_decay"] = 0.0
        return list(groups.values())

    def schedule(self, optimizer: Optimizer, factory: LRSchedulerCallable) -> dict[str, Any]:
        """Lightning's scheduler dictionary for `factory(optimizer)`, with the horizon bound where it needs
        one.
        """
        scheduler: LRScheduler | ReduceLROnPlateau = factory(optimizer)
        self._compare_length(scheduler)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"scheduler": scheduler, "monitor": scheduler.monitor, "interval": "epoch"}
        if isinstance(scheduler, WarmupSchedule):
            scheduler.bind(*self._horizon())
            return {"scheduler": scheduler, "interval": scheduler.interval}
        return {"scheduler": scheduler, "interval": self.lr_interval}

    def _compare_length(self, scheduler: LRScheduler | ReduceLROnPlateau) -> None:
        """Announce a schedule whose length was fixed for a run of another length."""
        option, length = fixed_length(scheduler) or ("", 0)
        if not option or self._trainer is None:
            return
        by_epoch = self.lr_interval == "epoch" or isinstance(scheduler, WarmupSchedule)
        unit = "epochs" if by_epoch else "optimiser steps"
        limit = self.trainer.max_epochs if by_epoch else self.trainer.estimated_stepping_batches
        if by_epoch and self.trainer.max_steps != -1 and (limit or -1) < 1:
            return  # a run of so many steps has no number of epochs
        tolerance = 0 if by_epoch else 1  # OneCycleLR objects to the last step of a run of `total_steps`
        if limit is not None and 0 < limit < float("inf") and abs(limit - length) > tolerance:
            rank_zero_warn(
                f"lr_scheduler {type(scheduler).__name__}: its {option} makes it {length:g} {unit} long, but "
                f"this run has {limit:g}: the rate does not end where the schedule does."
            )

    def _horizon(self) -> tuple[int, float]:
        """Epochs of the run and optimiser steps in one of them, a fraction where `max_steps` ends it."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise MisconfigurationException(
                "WarmupSchedule needs an end: set trainer.max_epochs or trainer.max_steps."
            )
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            return 1, int(steps)
        return epochs, steps / epochs

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only plain hyper-parameters, so that the file loads with `weights_only=True`; name the
        optimisers and the classes.
        """
        names = None if self._trainer is None else names_of(datamodule_of(self.trainer))
        if (names := names or self.class_names) is not None:
            checkpoint["class_names"] = names
        if "optimizer_states" in checkpoint:
            checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in self.trainer.optimizers]
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = _plain(dict(checkpoint["hyper_parameters"]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the state of objectives that are not attached now; ask for the callbacks of those that are
        missing.

        Raises:
            MisconfigurationException: the data's classes are in another order than the checkpoint's, or an
                objective has no state in it.
        """
        self.weights_origin = "checkpoint"
        self.class_names = checkpoint.get("class_names")
        if self.class_names is not None and self._trainer is not None:
            compare_names(self.class_names, datamodule_of(self.trainer))
        state = checkpoint["state_dict"]
        saved = {key.split(".")[1] for key in state if key.startswith("objectives.")}
        unclaimed = sorted(saved - set(self.objectives))
        if unclaimed:
            dropped = tuple(f"objectives.{name}." for name in unclaimed)
            checkpoint["state_dict"] = {
                key: value for key, value in state.items() if not key.startswith(dropped)
            }
            rank_zero_info(
                f"The checkpoint's training-only parts {unclaimed} are left out: nothing here uses them."
            )
        lacking = [n for n, objective in self.objectives.items() if objective.state_dict() and n not in saved]
        if lacking:
            raise MisconfigurationException(
                f"The checkpoint has no state for the objectives {lacking}: it comes from a run without "
                "them. To start "
                "from its weights, give it as `model.init_args.weights` instead of `ckpt_path`."
            )
        resumes = self._trainer is not None and self.trainer.state.fn == "fit"
        self._saved_optimizers = saved_optimizers(checkpoint) if resumes else None
        schedules = checkpoint.get("lr_schedulers")
        self._saved_schedules = len(schedules) if resumes and isinstance(schedules, list) else None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's.

        Raises:
            MisconfigurationException: the state is of another model; names the first keys of each kind.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            fault = state_fault(self.state_dict(), state_dict) or str(error)
            given = None if self._trainer is None else self.trainer.ckpt_path
            source = "The state" if given is None else f"The checkpoint '{given}'"
            raise MisconfigurationException(
                f"{source} is not of this {type(self).__name__}: {fault}."
            ) from error


_PLAIN: tuple[type, ...] = (str, int, float, bool, type(None), Tensor)
_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    """`value` with everything that is not a plain type left out, recursively."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        kept = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [item for item in map(_plain, value) if item is not _LEFT_OUT]
    return str(value) if hasattr(value, "__fspath__") else _LEFT_OUT
