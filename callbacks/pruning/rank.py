"""RankPruning (RPG): gradual pruning with regrowth, pushed away from low-rank weights."""

from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.pruning.growth import Apply, move_weights
from callbacks.pruning.magnitude import MagnitudePruning
from callbacks.pruning.rank_loss import Backend
from callbacks.pruning.rank_sweep import RankSweep, add_rank_gradients
from callbacks.pruning.report import layer_table, summary
from callbacks.pruning.schedules import Schedule, Timetable, drop_fraction_at
from lightning_modules.parts.options import check_choice, check_range

RankedLayers: TypeAlias = Literal["conv", "linear", "all"]


class RankPruning(MagnitudePruning):
    """Rank-based pruning ("Towards Higher Ranks via Adversarial Weight Pruning", NeurIPS 2023).

    At an update, in this order: the gradient of the rank loss joins the task's; the smallest weights of all
    layers are cut to the scheduled density; in each layer the smallest active weights make room for the
    positions of the largest gradients. `rank_weight=0` switches the rank loss off, `drop_fraction=0` the
    regrowth; both off is plain gradual magnitude pruning.

    Example:
        >>> callback = RankPruning(target_sparsity=0.98, rank_weight=4, rank_tolerance=0.2)
        >>> trainer = Trainer(callbacks=[callback], max_epochs=100)

    Args:
        target_sparsity: share of zeros among the selected weights at the end, in [0, 1).
        rank_weight: weight of the mean rank loss (the paper's lambda); its gradient scales as 1/||W||.
        rank_tolerance: share of a weight's energy that counts as dispensable (the paper's delta), in (0, 1).
        prune_end: share of the run after which the target density holds.
        topology_end: share of the run after which the masks are fixed.
        drop_fraction: share of a layer's weights that moves, at the start; falls along a half cosine (alpha).
        schedule: of the density: `exponential` (released with `global`), `cosine` (with the others) or
            `cubic`.
        apply: `step` lets the optimiser step with the combined gradient after the masks have changed;
            `growth_only` is the released behaviour: the optimiser skips updates, gradients only choose what
            grows.
        rank_on: layers that the rank loss acts on. `conv` is every selected layer that is no Linear.
        svd_backend: `gram` is fast, `svd` decomposes every layer fully.
        log_ranks: log `rpg/mean_delta_rank` and `rpg/mean_effective_rank` at every validation.
        options: of `MagnitudePruning`; update_every is the paper's Delta.
    """

    log_as: ClassVar[str] = "rpg"

    def __init__(
        self,
        target_sparsity: float,
        rank_weight: float,
        rank_tolerance: float = 0.2,
        *,
        prune_end: float = 0.9,
        topology_end: float = 0.901,
        drop_fraction: float = 0.3,
        schedule: Schedule = "exponential",
        apply: Apply = "step",
        rank_on: RankedLayers = "conv",
        svd_backend: Backend = "gram",
        log_ranks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(target_sparsity, prune_end=prune_end, schedule=schedule, **options)
        check_range("rank_weight", rank_weight, "[0, inf)")
        check_range("rank_tolerance", rank_tolerance, "(0, 1)")
        check_range("topology_end", topology_end, f"[{prune_end}, 1]")
        check_range("drop_fraction", drop_fraction, "[0, 1)")
        check_choice("apply", apply, Apply)
        check_choice("rank_on", rank_on, RankedLayers)
        check_choice("svd_backend", svd_backend, Backend)
        self.rank_weight = rank_weight
        self.rank_tolerance = rank_tolerance
        self.topology_end = topology_end
        self.drop_fraction = drop_fraction
        self.apply = apply
        self.rank_on = rank_on
        self.svd_backend = svd_backend
        self.log_ranks = log_ranks
        self._sweep = RankSweep(rank_tolerance, svd_backend)
        self._rank_loss: float | None = None

    def timetable(self, total_steps: int) -> Timetable:
        """Cuts until `prune_end`, moves until `topology_end`."""
        return Timetable.plan(total_steps, self.update_every, self.prune_end, self.topology_end)

    def update(self, due: int, gradients: dict[str, Tensor]) -> bool:
        """Rank gradient, cut, regrowth; skips the optimiser in `growth_only`, unless nothing ever grows."""
        if self.rank_weight > 0:
            self._add_rank_gradient(gradients)
        self.cut_if_open(due)
        if self.drop_fraction > 0:
            densities = self.cut().densities
            move_weights(self.masks, self.weights, gradients, self.drop_fraction_now(), densities)
        return self.apply == "growth_only" and self.drop_fraction > 0

    def between_updates(self, gradients: dict[str, Tensor]) -> None:
        """In `growth_only`, the released code's last rank loss.

        Its condition counts the steps before this one, that of an update those including it (RPG, sections
        2.3 and 2.5). So a `topology_end_step` that is a multiple of `update_every` gets a rank loss but no
        update: the one time that it moves the weights.
        """
        end = self.plan.topology_end_step
        last = self.step == end and end % self.update_every == 0
        if last and self.apply == "growth_only" and self.rank_weight > 0:
            self._add_rank_gradient(gradients)

    def _add_rank_gradient(self, gradients: dict[str, Tensor]) -> None:
        weights = self.ranked_weights()
        for name, weight in weights.items():
            if weight.grad is None:  # the task did not use it this time; the rank loss does
                weight.grad = torch.zeros_like(weight)
            gradients[name] = weight.grad
        self._rank_loss = add_rank_gradients(self._sweep(weights), weights, gradients, self.rank_weight)

    def ranked_weights(self) -> dict[str, nn.Parameter]:
        """The weights that the rank loss acts on."""
        return {
            name: self.weights[name]
            for name, layer in self.layers.items()
            if self.rank_on == "all" or (self.rank_on == "linear") == isinstance(layer, nn.Linear)
        }

    def drop_fraction_now(self) -> float:
        """`drop_fraction/2 (1 + cos(pi step / topology_end_step))`."""
        return drop_fraction_at(self.step, self.plan.topology_end_step, self.drop_fraction)

    def log_values(self) -> dict[str, float]:
        """Drop fraction, and the mean rank loss at the last update (about -rank_tolerance, whatever the
        ranks).
        """
        values = {"drop_fraction": self.drop_fraction_now()}
        return values if self._rank_loss is None else values | {"rank_loss": self._rank_loss}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean ranks, if asked for."""
        if self.log_ranks and self.weights and not trainer.sanity_checking:
            totals = summary(layer_table(self.ranked_weights() or self.weights))
            ranks = {key: value for key, value in totals.items() if key.endswith("rank")}
            pl_module.log_dict({f"{self.log_as}/{key}": value for key, value in ranks.items()})

    def configuration(self) -> dict[str, Any]:
        """What the schedule depends on."""
        return super().configuration() | {
            "topology_end": self.topology_end,
            "drop_fraction": self.drop_fraction,
            "apply": self.apply,
        }
