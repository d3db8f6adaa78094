"""What a Lightning checkpoint lacks for an exact resume; the loaders look after their own part.

Seen in Lightning 2.6: a checkpoint that is written right after a batch that validation follows, or after the
last batch of an epoch, makes the resumed run skip that validation and the hooks of the epoch's end. Written
at the end of an epoch under ``max_steps``, it makes an epoch count twice. Written inside a step, by a signal
or on an exception, its counters and its loaders disagree about that step's batch. Gradients that wait for
more batches of ``accumulate_grad_batches`` are lost. And where ``configure_optimizers`` asks for the number
of steps, the loaders never get their states.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed

from callbacks.run.geometry import convert_counters, save_geometry
from callbacks.run.plateau import PlateauSteps
from lightning_modules.parts.strategies import is_sharded

Counters = dict[str, Any]
"""State of one of Lightning's progress trackers: "total" and "current", each with "ready", "started", ..."""

_GRADIENTS = "accumulated_gradients"
_STAGES = ("ready", "started", "processed", "completed")


class ExactResume(Callback):
    """Makes a run that is resumed from any checkpoint of ``fit`` continue as if nothing had happened.

    It changes no run, only what is written: the loops' counters in a checkpoint are moved to the nearest
    state that Lightning restores correctly (the batch of a broken step is done again, an unfinished
    validation starts anew), and the gradients of an unfinished accumulation are added. Works with every way
    of saving, and needs loaders that know their place, as the data modules' do (others cannot resume inside
    an epoch anyway). Without ``ExactResume``, a resumed run still sees the right batches.

    The run that resumes may have another batch size, number of ranks or accumulation: what counts batches or
    steps is converted, or refused where it cannot be, see `convert_counters`.

    Gradients are averaged over the ranks, as DDP would do later. Sharded strategies (FSDP, DeepSpeed) keep no
    whole gradients; there a warning says that those of the unfinished accumulation are lost.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._geometry: dict[str, Any] | None = None
        self._plateau = PlateauSteps()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Corrects the counters in ``checkpoint`` and adds the gradients."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        save_geometry(trainer, checkpoint)
        checkpoint["plateau"] = self._plateau.state(trainer)
        gradients = _accumulated_gradients(trainer, pl_module)
        if gradients:
            checkpoint[_GRADIENTS] = gradients
        _correct(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the gradients, which ``on_train_start`` hands to the parameters."""
        self._gradients = checkpoint.get(_GRADIENTS, {})
        self._geometry = checkpoint.get("geometry")
        self._plateau.restore(checkpoint.get("plateau"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Converts counters, and restores the gradients of an accumulation that the interruption cut in two.

        Where ``configure_optimizers`` asked for the number of steps, Lightning made the loaders before it
        read the checkpoint, and does not hand them their states any more: that is done here.
        """
        trainer.fit_loop._load_combined_loader_states()
        if not convert_counters(trainer, self._geometry, waiting=bool(self._gradients)):
            parameters = dict(pl_module.named_parameters())
            for name, gradient in self._gradients.items():
                parameters[name].grad = gradient.to(parameters[name].device)
        self._gradients, self._geometry = {}, None
        self._plateau.take(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See which schedules Lightning is not going to step."""
        self._plateau.end_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step them."""
        self._plateau.take(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step them."""
        self._plateau.take(trainer)


def _correct(loops: dict[str, Any], trainer: Trainer) -> None:
    """Moves the counters of a checkpoint's fit loop to a state that Lightning restores without loss."""
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    if epochs["processed"] > epochs["completed"]:
        if trainer.max_steps != -1:
            _finish_epoch(loops)
            _discount_step(loops, trainer)
    elif trainer.validating:
        validation = loops["epoch_loop.val_loop.batch_progress"]
        if (
            not validation["is_last_batch"]
            or validation["current"]["completed"] < validation["current"]["ready"]
        ):
            _restart_validation(validation)
    elif batches["ready"] > batches["processed"]:
        _undo_step(loops, trainer)
        _discount_step(loops, trainer)
    elif batches["processed"] > batches["completed"]:
        _after_batch(loops, trainer)
    else:
        _discount_step(loops, trainer)


def _after_batch(loops: dict[str, Any], trainer: Trainer) -> None:
    """Saved in ``on_train_batch_end``: what follows this batch still has to be done."""
    epoch_loop, batches = trainer.fit_loop.epoch_loop, loops["epoch_loop.batch_progress"]
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None and epoch_loop._should_check_val_fx(fetcher):
        _level(batches, "processed")
        _restart_validation(loops["epoch_loop.val_loop.batch_progress"])
    elif batches["is_last_batch"]:
        _level(batches, "processed")
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        _place_loaders(loops, trainer, None)


def _undo_step(loops: dict[str, Any], trainer: Trainer) -> None:
    """Saved inside a training step: its batch is drawn again, as none of its effects can be trusted to be
    whole.
    """
    _level(loops["epoch_loop.batch_progress"], "completed")
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    _place_loaders(loops, trainer, loops["epoch_loop.batch_progress"]["current"]["completed"])


def _finish_epoch(loops: dict[str, Any]) -> None:
    """Saved in ``on_train_epoch_end``: the next epoch is the next thing to do, also under ``max_steps``."""
    _level(loops["epoch_progress"], "processed")
    batches = loops["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def _discount_step(loops: dict[str, Any], trainer: Trainer) -> None:
    """Takes back a count of the loggers' step.

    Where validation followed the last batch, or would follow a zeroth one, a resumed run passes that batch's
    end once more and counts it, though it is in the count already.
    """
    batches, every = loops["epoch_loop.batch_progress"], trainer.check_val_every_n_epoch
    next_epoch = loops["epoch_progress"]["current"]["completed"] + 1
    done = batches["current" if every else "total"]["ready"]
    validates = (
        trainer.enable_validation and trainer.val_check_batch and (not every or next_epoch % every == 0)
    )
    steps = batches["current"]["ready"] % trainer.accumulate_grad_batches == 0
    if validates and steps and done % trainer.val_check_batch == 0:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _restart_validation(validation: Counters) -> None:
    """The pattern by which Lightning knows a validation that was cut off in a batch: here, in its first."""
    done = validation["total"]["completed"]
    validation["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["is_last_batch"] = False


def _level(progress: Counters, stage: str) -> None:
    """Sets all the stages of a tracker to the count of one of them."""
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(_STAGES, counts[stage]))


def _place_loaders(loops: dict[str, Any], trainer: Trainer, batches: int | None) -> None:
    """Makes the training loaders resume after ``batches`` batches; None: at the end of the epoch."""
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return
    done = max(map(len, combined.flattened)) if batches is None else batches
    for state, loader in zip(
        loops["state_dict"].get("combined_loader", []), combined.flattened, strict=False
    ):
        if "samples" in state:
            state["samples"] = loader.samples_after(done)


def _accumulated_gradients(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """The gradients that wait for more batches, averaged over the ranks; empty when none do."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.state_dict()
    processed = progress["current"]["processed"]
    waiting = processed % trainer.accumulate_grad_batches
    epoch_done = progress["is_last_batch"] and processed == progress["current"]["ready"]
    if not module.automatic_optimization or not waiting or epoch_done:
        return {}
    if is_sharded(trainer.strategy):
        rank_zero_warn(
            f"This checkpoint is written after {waiting} of {trainer.accumulate_grad_batches} batches "
            "(accumulate_grad_batches), and their gradients are sharded: a run resumed from it loses them."
        )
        return {}
    gradients = {n: p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None}
    if trainer.world_size > 1:
        for gradient in gradients.values():
            distributed.all_reduce(gradient)
            gradient /= trainer.world_size
    return gradients
