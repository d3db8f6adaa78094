"""timm's learning-rate schedules, with the run's own length as their horizon."""

from typing import Any, Literal

from timm.scheduler import create_scheduler_v2
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)


def fixed_length(scheduler: LRScheduler | ReduceLROnPlateau) -> tuple[str, float] | None:
    """The option that fixes when a schedule reaches its end, and when that is; None if it has no end.

    A warm-up ends early by design, so a rising `LinearLR` and `ConstantLR` are none of these; of schedules in
    a row the last one is asked.
    """
    if isinstance(scheduler, WarmupSchedule):
        options = scheduler._options
        prefix = options["warmup_epochs"] if options["warmup_prefix"] else 0
        return None if scheduler.epochs is None else ("epochs", scheduler.epochs + prefix)
    if isinstance(scheduler, SequentialLR):
        last = fixed_length(scheduler._schedulers[-1])
        return None if last is None else (f"milestones and {last[0]}", scheduler._milestones[-1] + last[1])
    if isinstance(scheduler, LinearLR) and scheduler.end_factor < scheduler.start_factor:
        return "total_iters", scheduler.total_iters
    for kind, option in (
        (CosineAnnealingLR, "T_max"),
        (OneCycleLR, "total_steps"),
        (PolynomialLR, "total_iters"),
    ):
        if isinstance(scheduler, kind):
            return option, getattr(scheduler, option)
    return None


class WarmupSchedule(LRScheduler):
    """A timm schedule (warm-up, then decay) that a YAML file can name without repeating `trainer.max_epochs`.

    The rate at time t is timm's: linear warm-up from `warmup_lr` over `warmup_epochs`, then the decay as a
    function of t itself (not shifted by the warm-up unless `warmup_prefix`). `bind` must be called once the
    horizon is known; `Method.configure_optimizers` does so.

    Args:
        optimizer: filled in by `Method`.
        kind: shape of the decay.
        interval: the rate changes after every optimiser `step` or every `epoch`.
        epochs: horizon in epochs; None is the trainer's.
        warmup_epochs: length of the linear warm-up, epochs (a fraction is allowed with `interval: step`).
        warmup_lr: rate at t = 0 when there is a warm-up.
        min_lr: rate at the end of the decay (absolute, for groups with multiplier 1).
        decay_epochs: period of `step`.
        decay_milestones: epochs of `multistep`.
        decay_rate: factor of `step`, `multistep` and the power of `poly`.
        warmup_prefix: the decay starts after the warm-up instead of running beneath it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kind: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = "cosine",
        interval: Literal["step", "epoch"] = "step",
        epochs: int | None = None,
        warmup_epochs: float = 0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        decay_epochs: float = 30,
        decay_milestones: list[int] | None = None,
        decay_rate: float = 0.1,
        warmup_prefix: bool = False,
    ) -> None:
        if interval == "epoch" and warmup_epochs != int(warmup_epochs):
            raise ValueError(f"warmup_epochs: {warmup_epochs} is not whole, but interval is 'epoch'.")
        self.optimizer = optimizer
        self.interval = interval
        self.epochs = epochs
        self.last_epoch = 0
        constant = kind == "constant"  # a step schedule that never decays: every timm 1.0 has that one
        self._options: dict[str, Any] = {
            "sched": "step" if constant else kind,
            "warmup_epochs": warmup_epochs if interval == "step" else int(warmup_epochs),
            "warmup_lr": warmup_lr,
            "min_lr": min_lr,
            "decay_epochs": decay_epochs,
            "decay_milestones": decay_milestones or (90, 180, 270),
            "decay_rate": 1.0 if constant else decay_rate,
            "warmup_prefix": warmup_prefix,
            "step_on_epochs": interval == "epoch",
        }

    def bind(self, epochs: int, steps_per_epoch: float) -> None:
        """Fix the horizon and set the rate of the first step.

        Args:
            epochs: length of the run, used where the user gave none.
            steps_per_epoch: optimiser steps in an epoch.

        Raises:
            ValueError: the warm-up is longer than the run.
        """
        horizon = self.epochs or epochs
        if self._options["warmup_epochs"] > horizon:
            raise ValueError(
                f"warmup_epochs: {self._options['warmup_epochs']} is longer than the run ({horizon})."
            )
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._timm, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=horizon,
            updates_per_epoch=steps_per_epoch,  # type: ignore[arg-type]  # a run may end inside an epoch
            cooldown_epochs=0,
            **self._options,
        )
        self._apply()

    def step(self, epoch: int | None = None) -> None:
        """Move on by one step or epoch (or to `epoch`)."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._apply()

    def _apply(self) -> None:
        if self.interval == "epoch":
            self._timm.step(self.last_epoch)
        else:
            self._timm.step_update(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        """Rates in force, one a parameter group."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """The position; the shape of the schedule comes from the configuration."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.last_epoch = state_dict["last_epoch"]
        self._apply()
