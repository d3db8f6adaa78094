"""What a run is steered by must be among what it measures, which is known before the first step."""

import difflib
from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class MonitorCheck(Callback):
    """Refuses a `monitor` that validation does not report, after the few batches of the sanity check.

    It looks at every callback with a `monitor` (checkpoints, early stopping) and at every schedule with one.
    Names that begin with `train/` are known later, and are let through.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare names.

        Raises:
            MisconfigurationException: a monitored name is not among the metrics; names those that are.
        """
        known = sorted(trainer.callback_metrics)
        if not known:  # a method may measure nothing in so few batches
            return
        for owner, name in _monitored(trainer):
            if name in known or name.startswith("train/"):
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise MisconfigurationException(
                f"{owner}: monitor is '{name}', which validation does not report ({hint}it reports "
                f"{', '.join(known)}). If it is only known after a whole epoch, set "
                "trainer.num_sanity_val_steps: 0."
            )


def _monitored(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Who monitors what."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(name := getattr(callback, "monitor", None), str):
            yield type(callback).__name__, name
    for schedule in trainer.lr_scheduler_configs:
        if schedule.reduce_on_plateau and schedule.monitor is not None:
            yield type(schedule.scheduler).__name__, schedule.monitor
