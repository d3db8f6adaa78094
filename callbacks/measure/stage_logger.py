"""How GenDet's student and augmenter chase each other, on held-out images after every epoch."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.run.directory import announce, replaced_atomically, run_directory
from lightning_modules.gendet.losses import agreement_loss, disagreement_loss
from lightning_modules.gendet.module import GenDet
from lightning_modules.gendet.schedule import STAGES

CURVES = ("real_loss", "fake_loss", "augmenter_loss", "cosine", "discrepancy", "variance")


class StageLogger(Callback):
    """Logs the stage, the rotation and the three losses on the validation images after every epoch.

    Logged as `stage/number` (0 teacher, 1 real, 2 fake, 3 augment, 4 classifier), `stage/rotation`, and on
    the same images every time: `stage/real_loss` (L_r on reals), `stage/fake_loss` (L_f on augmented fakes),
    `stage/augmenter_loss` (L_g), `stage/cosine` of teacher and student on augmented fakes,
    `stage/discrepancy` (mean D on fakes as they are) and `stage/variance` of the augmented fakes over the
    images: if it falls to 0, the augmenter has collapsed. Expect saw-teeth, not convergence.
    `stages.png` shows them after `fit`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._history: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another module.

        Raises:
            MisconfigurationException: the module is not GenDet.
        """
        if not isinstance(pl_module, GenDet):
            raise MisconfigurationException(
                f"StageLogger follows GenDet's stages; {type(pl_module).__name__} has none."
            )

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves."""
        self._history = [list(row) for row in state_dict["history"]]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin sums at zero."""
        self._sums = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        if trainer.state.fn == "fit" and isinstance(pl_module, GenDet):
            for name, value in stage_sums(pl_module, batch).items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over all ranks' images."""
        if trainer.sanity_checking or not self._sums or not isinstance(pl_module, GenDet):
            return
        sums = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._sums.items()}
        values = stage_means(sums)
        number = STAGES.index(pl_module.stage)
        rotation = pl_module.stages.rotation_of(trainer.current_epoch)
        pl_module.log_dict(
            {f"stage/{name}": value for name, value in values.items()}
            | {"stage/number": float(number), "stage/rotation": float(rotation)},
            rank_zero_only=False,
        )
        self._history = [row for row in self._history if row[0] < trainer.current_epoch]
        self._history.append([float(trainer.current_epoch), float(number), *values.values()])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        if trainer.is_global_zero and len(self._history) > 1:
            path = run_directory(trainer) / "stages.png"
            with replaced_atomically(path) as unfinished:
                draw_stages(unfinished, self._history)
            announce(trainer, f"the stages are drawn in {path}")


@torch.no_grad()
def stage_sums(module: GenDet, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Sums over a batch, from which `stage_means` makes means; the counts are among them."""
    network, embedded, fake = module.network, None, batch["label"] == 1
    embedded = network.embed(module.inputs(batch))
    sums: dict[str, Tensor] = {"reals": (~fake).sum().float(), "fakes": fake.sum().float()}
    real = embedded[~fake]
    zero = embedded.new_zeros(())
    sums["real_loss"] = (
        len(real) * agreement_loss(network.teacher(real), network.student(real), module.discrepancy_reduction)
        if len(real)
        else zero
    )
    fakes = embedded[fake]
    moved = module.augmented(fakes)
    pair = network.teacher(moved), network.student(moved)
    for name, value in (
        ("fake_loss", lambda: disagreement_loss(*pair, module.margin, module.alpha)),
        ("augmenter_loss", lambda: agreement_loss(*pair, module.discrepancy_reduction)),
        ("cosine", lambda: F.cosine_similarity(*pair).mean()),
        ("discrepancy", lambda: network.discrepancy(fakes).mean()),
    ):
        sums[name] = len(fakes) * value() if len(fakes) else zero
    sums["moved"] = moved.float().sum(dim=0)
    sums["moved_squares"] = moved.float().square().sum(dim=0)
    return sums


def stage_means(sums: dict[str, Tensor]) -> dict[str, float]:
    """The curves' values in the order of `CURVES`."""
    reals, fakes = sums["reals"].clamp_min(1), sums["fakes"].clamp_min(1)
    values = {"real_loss": sums["real_loss"] / reals}
    for name in ("fake_loss", "augmenter_loss", "cosine", "discrepancy"):
        values[name] = sums[name] / fakes
    mean = sums["moved"] / fakes
    values["variance"] = (sums["moved_squares"] / fakes - mean.square()).mean()
    return {name: values[name].item() for name in CURVES}


def draw_stages(path: Any, history: list[list[float]]) -> None:
    """The curves over the epochs, the stages as coloured bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row[0] for row in history]
    colours = ("#eceff1", "#c8e6c9", "#ffcdd2", "#ffe0b2", "#d1c4e9")
    for place, name in enumerate(CURVES):
        axes = figure.add_subplot(2, 3, place + 1)
        for row in history:
            axes.axvspan(row[0] - 0.5, row[0] + 0.5, color=colours[int(row[1])], linewidth=0)
        axes.plot(epochs, [row[2 + place] for row in history], color="#202020", linewidth=1.2)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("epoch", fontsize=8)
    patches = [Patch(color=colour, label=name) for colour, name in zip(colours, STAGES, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
