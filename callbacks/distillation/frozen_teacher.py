"""The frozen classifier as a teacher: how it is built, what it sees, and what it answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.distillation.base import FrozenTeacher
from callbacks.distillation.functional import full_precision
from callbacks.distillation.taps import Features, NetworkTaps
from lightning_modules.parts.normalize import (
    Statistics,
    knows_statistics,
    normalized,
    trained_statistics,
)
from lightning_modules.parts.students import from_timm_065
from lightning_modules.parts.weights import build_network, load_weights, read_checkpoint


class ClassifierTeacher(FrozenTeacher):
    """A frozen classifier that hands out features of its stages beside the logits.

    Args:
        network: gives logits (B, K) for normalised images (B, 3, H, W).
        name: of the architecture, for messages and checkpoints.
        taps: module paths of its four stage ends; None finds them.
        statistics: its own normalisation; None feeds it what the student sees.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        taps: list[str] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(network, name)
        self.taps = NetworkTaps(network, taps, f"teacher {name}")
        self._statistics = statistics

    def features(self, images: Tensor, normalize: Callable[[Tensor], Tensor]) -> Features:
        """What the teacher says of a batch: copies that autograd may save.

        Args:
            images: (B, 3, H, W) in [0, 1].
            normalize: what the student does to them; not called for a teacher with statistics of its own.
        """
        return self.once(images, lambda: self._ask(images, normalize))

    def _ask(self, images: Tensor, normalize: Callable[[Tensor], Tensor]) -> Features:
        own = self._statistics
        logits = self(normalize(images) if own is None else normalized(images, own.mean, own.std))
        recorded = self.taps.collect(logits)
        penultimate = None if recorded.penultimate is None else recorded.penultimate.clone()
        stages = {stage: feature.clone() for stage, feature in recorded.stages.items()}
        return Features(full_precision(logits), stages, penultimate)

    def forget(self) -> None:
        """Release the last batch and its features."""
        super().forget()
        self.taps.clear()


def build_teacher(
    teacher: str | nn.Module | None,
    weights: str | Path | None,
    teacher_args: dict[str, Any],
    num_classes: int,
    role: str = "DistillationTeacher",
) -> tuple[nn.Module, str]:
    """The teacher's network and the name of its architecture.

    Args:
        teacher: timm name, network, or None where `weights` is a checkpoint of ours.
        weights: `pretrained`, a file, or None.
        teacher_args: further arguments of timm's model.
        num_classes: of the student; a teacher with a file of its own classes must agree.
        role: who asks, for messages.

    Raises:
        ValueError: there is nothing to build the teacher from, or timm has no such model.
        MisconfigurationException: keys or shapes of the file do not fit; the first are listed.
    """
    file = None if weights in (None, "pretrained") else Path(str(weights))
    if isinstance(teacher, nn.Module):
        if file is not None:
            load_weights(teacher, file, from_timm_065)
        return teacher, type(teacher).__name__
    if teacher is None:
        return _from_our_checkpoint(file, teacher_args, role)
    if weights == "pretrained":
        return build_network(teacher, "pretrained", None, **teacher_args), teacher
    network = build_network(teacher, None, num_classes, **teacher_args)
    if file is None:
        rank_zero_warn(f"{role}: {teacher} has random weights, as `weights` is null.")
    else:
        load_weights(network, file, from_timm_065)
    return network, teacher


def _from_our_checkpoint(file: Path | None, teacher_args: dict[str, Any], role: str) -> tuple[nn.Module, str]:
    if file is None:
        raise ValueError(f"{role}: name a network, or give `weights` that are a checkpoint of Featherlight.")
    parameters = read_checkpoint(file).get("hyper_parameters") or {}
    if "model" not in parameters:
        raise ValueError(f"{role}: '{file}' does not say what model it is of; name the network too.")
    model_args = {**(parameters.get("model_args") or {}), **teacher_args}
    statistics = {key: tuple(parameters[key]) for key in ("mean", "std") if parameters.get(key)}
    if statistics:  # what it was trained with counts, not what timm says of its architecture
        model_args["pretrained_cfg_overlay"] = statistics
    network = build_network(parameters["model"], None, parameters.get("num_classes"), **model_args)
    load_weights(network, file)
    return network, parameters["model"]


def own_statistics(network: nn.Module, name: str) -> Statistics:
    """Mean and standard deviation that a timm network was trained with.

    Raises:
        ValueError: it is no timm network.
    """
    if not knows_statistics(network):
        raise ValueError(
            f"renormalize_for_teacher: the teacher {name} does not say what normalisation it is used to."
        )
    return trained_statistics(network)
