"""What the framework costs: a training step through `featherlight fit` against the same step in a bare
PyTorch loop, alone and with a teacher (KD) and a pruning schedule plugged in.

Same network, weights, data module, loader, augmentation and optimiser, steps of one epoch; both sides train
alternately in one process. The bare loop does by hand what the plug-ins do: a teacher's forward pass and the
KD term, a global magnitude cut every ten steps, masks on the weights after every step. With one thread the
time is the process's own (CPU time), which other people's jobs disturb least.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import clock, markdown, ratios, turns, write_numbers
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from datamodules import CIFAR100DataModule, ImageTransforms
from featherlight_cli import run
from lightning_modules import ImageClassifier

WARM_UP = 5
PLUG_INS = Path(__file__).parents[1] / "configs" / "callbacks"
CUT_EVERY = 10
SPARSITY = 0.8
CUTTING = 0.75  # share of the run in which the sparsity grows


class Stopwatch(Callback):
    """Seconds between the end of the last warm-up step and the end of the last step."""

    now: Callable[[], float]
    seconds = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == WARM_UP:
            self._start = Stopwatch.now()
        Stopwatch.seconds = Stopwatch.now() - self._start if trainer.global_step > WARM_UP else 0.0


def data_options(root: Path, options: argparse.Namespace) -> dict:
    size = options.batch_size * (WARM_UP + options.steps)  # one epoch: no checkpoint at the end of one
    data = {"root": str(root), "sample": True, "sample_size": size, "batch_size": options.batch_size}
    return {**data, "num_workers": 0, "drop_last": True}


def through_featherlight(model: str, plugged: bool, root: Path, options: argparse.Namespace) -> float:
    """Seconds a step."""
    arguments = ["fit", "--model", "ImageClassifier", "--model.init_args.model", model]
    arguments += ["--model.init_args.num_classes", "10", "--data", "CIFAR100DataModule"]
    for key, value in data_options(root, options).items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        arguments += [f"--data.init_args.{key}", text]
    arguments += ["--data.init_args.transforms.image_size", "32"]
    arguments += ["--data.init_args.transforms.train_crop", "pad"]
    arguments += ["--trainer.max_steps", str(WARM_UP + options.steps), "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.limit_val_batches", "0", "--trainer.default_root_dir", str(root / "run")]
    if plugged:
        arguments += [f"--trainer.callbacks+={PLUG_INS / 'kd.yaml'}"]
        arguments += ["--trainer.callbacks.teacher", model, "--trainer.callbacks.weights", "null"]
        arguments += [f"--trainer.callbacks+={PLUG_INS / 'magnitude_pruning.yaml'}"]
        arguments += ["--trainer.callbacks.update_every", str(CUT_EVERY)]
    arguments += ["--trainer.callbacks+", f"{__name__}.Stopwatch"]
    arguments += ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.01"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = run(arguments)
    if status:
        raise SystemExit(f"featherlight fit failed with status {status}: {errors.getvalue()[-500:]}")
    return Stopwatch.seconds / options.steps


def bare_loop(model: str, plugged: bool, root: Path, options: argparse.Namespace) -> float:
    """Seconds a step."""
    seed_everything(0, verbose=False)
    module = ImageClassifier(model, 10)
    network, mean, std = module.network.train(), module.mean, module.std
    transforms = ImageTransforms(image_size=32, train_crop="pad")
    data = CIFAR100DataModule(transforms=transforms, **data_options(root, options))
    data.prepare_data()
    data.setup("fit")
    teacher = timm.create_model(model, num_classes=10).eval() if plugged else None
    cutter = Cutter(network, options.steps + WARM_UP) if plugged else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    start = 0.0
    for done, batch in enumerate(data.train_dataloader(), start=1):
        images = (batch["image"] - mean) / std
        logits = network(images)
        loss = F.cross_entropy(logits, batch["label"])
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(images)
            log_p, log_q = taught.log_softmax(dim=1), logits.log_softmax(dim=1)
            loss = loss + F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cutter is not None:
            cutter(done)
        if done == WARM_UP:
            start = Stopwatch.now()
    return (Stopwatch.now() - start) / options.steps


class Cutter:
    """Gradual magnitude pruning as one would write it into a loop.

    Args:
        network: its conv and linear weights are pruned.
        steps: of the run.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.weights: list[Tensor] = [layer.weight for layer in layers]
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]
        self.steps = steps

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """After the optimiser's step."""
        share = step / (CUTTING * self.steps)
        if step % CUT_EVERY == 0 and share <= 1:
            magnitudes = torch.cat([weight.abs().flatten() for weight in self.weights])
            dead = int(SPARSITY * (1 - (1 - share) ** 3) * len(magnitudes))
            threshold = magnitudes.kthvalue(max(1, dead)).values
            self.masks = [weight.abs() > threshold for weight in self.weights]
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.mul_(mask)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["test_resnet", "resnet18"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["PL_GLOBAL_SEED"] = "0"
    label, Stopwatch.now = clock("cpu", options.threads)
    ways = {"featherlight": through_featherlight, "bare loop": bare_loop}
    heads = [
        f"{label} a step, batch {options.batch_size}",
        *(f"{way}, ms" for way in ways),
        "ratio",
        "ratios",
    ]
    rows, numbers = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            for plugged in (False, True):
                times: dict[str, list[float]] = {way: [] for way in ways}
                for way in turns(list(ways), options.repeats):
                    times[way].append(ways[way](model, plugged, Path(folder), options))
                by_round = ratios(times["featherlight"], times["bare loop"])
                name = f"{model}, KD and pruning" if plugged else model
                medians = [f"{1e3 * statistics.median(times[way]):.2f}" for way in ways]
                listed = ", ".join(f"{ratio:.3f}" for ratio in by_round)
                rows.append([name, *medians, f"{statistics.median(by_round):.3f}", listed])
                numbers.append({"model": model, "plugged": plugged, "seconds": times, "ratios": by_round})
    print(markdown(heads, rows))
    write_numbers(options.json, numbers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
