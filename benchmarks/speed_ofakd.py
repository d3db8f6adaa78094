"""What a distillation step costs: the student alone, with KD, with OFA (four exit branches), with OFA and
FitNet.

Every variant trains with the Trainer, the real module and the real callback; the rounds are interleaved, each
starting with another variant. Images are noise and weights random: the cost depends on neither. The teacher's
forward pass is timed inside the step. With one thread the time is the process's own (CPU time), which other
people's jobs disturb least, else wall time. Peak memory is the whole process's: it holds what all variants
share (libraries, teacher, batches), too.
"""

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from common import clock, forget_peak, markdown, peak_mebibytes, ratios, turns
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from callbacks.distillation import KD, OFA, Criterion, DistillationTeacher, FitNet
from lightning_modules import ImageClassifier

VARIANTS: dict[str, Callable[[], list[Criterion]]] = {
    "student alone": lambda: [],
    "KD": lambda: [KD()],
    "OFA": lambda: [OFA()],
    "OFA + FitNet": lambda: [OFA(), FitNet()],
}


class Noise(IterableDataset[dict[str, Tensor]]):
    """One batch for ever: reading costs nothing."""

    def __init__(self, batch_size: int, image_size: int, classes: int) -> None:
        self.batch = {
            "image": torch.rand(batch_size, 3, image_size, image_size),
            "label": torch.randint(classes, (batch_size,)),
            "index": torch.arange(batch_size),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch


class Stopwatch(Callback):
    """Seconds from one training step's end to the next one's, and of the teacher's forward pass within.

    Args:
        warm_up: steps that do not count.
        now: the clock.
    """

    def __init__(self, warm_up: int, now: Callable[[], float]) -> None:
        self.warm_up = warm_up
        self.now = now
        self.steps: list[float] = []
        self.teacher: list[float] = []
        self.parameters = 0
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DistillationTeacher):
                network = callback.frozen.network
                self._handles.append(network.register_forward_pre_hook(self._teacher_starts))
                self._handles.append(network.register_forward_hook(self._teacher_ends))
        self._last = self.now()

    def _teacher_starts(self, *_: Any) -> None:
        self._start = self.now()

    def _teacher_ends(self, *_: Any) -> None:
        self.teacher.append(self.now() - self._start)

    def on_train_batch_end(self, *_: Any) -> None:
        last, self._last = self._last, self.now()
        self.steps.append(self._last - last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self.steps, self.teacher = self.steps[self.warm_up :], self.teacher[self.warm_up :]


@dataclass
class Fit:
    """What one short training took.

    Attributes:
        step: median seconds of a step.
        teacher: median seconds of the teacher's forward pass, 0 without one.
        memory: peak, MiB.
        parameters: that are trained, the criteria's own included.
    """

    step: float
    teacher: float
    memory: float
    parameters: int


def fit(criteria: list[Criterion], teacher: nn.Module, options: argparse.Namespace) -> Fit:
    """Trains a new student for some steps."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    module = ImageClassifier(options.student, options.classes, optimizer=optimizer)
    watch = Stopwatch(options.warm_up, clock(options.device, options.threads)[1])
    callbacks: list[Callback] = [watch]
    if criteria:
        callbacks.append(DistillationTeacher(teacher, None, criteria, image_size=options.image_size))
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        max_steps=options.warm_up + options.steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    noise = Noise(options.batch_size, options.image_size, options.classes)
    forget_peak()
    trainer.fit(module, DataLoader(noise, batch_size=None))
    taught = statistics.median(watch.teacher) if watch.teacher else 0.0
    return Fit(statistics.median(watch.steps), taught, peak_mebibytes(), watch.parameters)


def measured(options: argparse.Namespace) -> dict[str, list[Fit]]:
    """Every variant once a round, each round starting with another one."""
    teacher = timm.create_model(options.teacher, num_classes=options.classes, **dict(options.teacher_args))
    found: dict[str, list[Fit]] = {name: [] for name in VARIANTS}
    for name in turns(list(VARIANTS), options.repeats):
        found[name].append(fit(VARIANTS[name](), teacher, options))
    return found


def report(found: dict[str, list[Fit]]) -> str:
    """A Markdown table of medians; ratios are medians of the rounds' own ratios."""
    alone = [run.step for run in found["student alone"]]
    kd = [run.step for run in found["KD"]]
    heads = ["variant", "ms a step", "of it teacher", "over alone", "over KD", "extra parameters", "peak MiB"]
    rows = []
    own = found["student alone"][0].parameters
    for name, runs in found.items():
        steps = [run.step for run in runs]
        cells = [
            name,
            f"{1e3 * statistics.median(steps):.1f}",
            f"{1e3 * statistics.median(run.teacher for run in runs):.1f}",
            *(f"{statistics.median(ratios(steps, base)):.3f}" for base in (alone, kd)),
            f"{(runs[0].parameters - own) / 1e6:.2f} M",
            f"{statistics.median(run.memory for run in runs):.0f}",
        ]
        rows.append(cells)
    return markdown(heads, rows)


def key_and_number(text: str) -> tuple[str, int]:
    key, _, number = text.partition("=")
    return key, int(number)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="resnet18", help="timm name")
    parser.add_argument("--teacher", default="convnext_tiny", help="timm name")
    parser.add_argument(
        "--teacher-args", nargs="*", default=[], type=key_and_number, metavar="KEY=N", help="as img_size=112"
    )
    parser.add_argument("--image-size", type=int, default=112, help="pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a variant in a round")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true", help="the Trainer's")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        f"{options.student} taught by {options.teacher}, {options.image_size} x {options.image_size} pixels, "
        f"batch {options.batch_size}, {options.device}, {options.precision}, threads: {options.threads}; "
        f"{clock(options.device, options.threads)[0]}, "
        f"medians of {options.repeats} rounds of {options.steps} steps\n"
    )
    print(report(measured(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
