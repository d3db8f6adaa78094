"""What the framework costs: a training step through `featherlight fit` against the same step in a bare
PyTorch loop.

Same network, weights, data module, loader, augmentation and optimiser, steps of one epoch; each side trains
alternately in one process.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything

from datamodules import CIFAR100DataModule, ImageTransforms
from featherlight_cli import run
from lightning_modules import ImageClassifier

WARM_UP = 5


class Stopwatch(Callback):
    """Seconds between the end of the last warm-up step and the end of the last step."""

    seconds = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == WARM_UP:
            self._start = time.perf_counter()
        Stopwatch.seconds = time.perf_counter() - self._start if trainer.global_step > WARM_UP else 0.0


def data_options(root: Path, batch_size: int, steps: int) -> dict:
    size = batch_size * (WARM_UP + steps)  # one epoch: a bare loop writes no checkpoint at the end of one
    options = {"root": str(root), "sample": True, "sample_size": size, "batch_size": batch_size}
    return {**options, "num_workers": 0, "drop_last": True}


def through_featherlight(model: str, root: Path, batch_size: int, steps: int) -> float:
    arguments = ["fit", "--model", "ImageClassifier", "--model.init_args.model", model]
    arguments += ["--model.init_args.num_classes", "10", "--data", "CIFAR100DataModule"]
    for key, value in data_options(root, batch_size, steps).items():
        arguments += [
            f"--data.init_args.{key}",
            str(value).lower() if isinstance(value, bool) else str(value),
        ]
    arguments += [
        "--data.init_args.transforms.image_size",
        "32",
        "--data.init_args.transforms.train_crop",
        "pad",
    ]
    arguments += ["--trainer.max_steps", str(WARM_UP + steps), "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.limit_val_batches", "0", "--trainer.default_root_dir", str(root / "run")]
    arguments += [
        "--trainer.callbacks+",
        f"{__name__}.Stopwatch",
        "--model.init_args.optimizer",
        "torch.optim.SGD",
    ]
    arguments += ["--model.init_args.optimizer.lr", "0.01"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = run(arguments)
    if status:
        raise SystemExit(f"featherlight fit failed with status {status}")
    return Stopwatch.seconds / steps


def bare_loop(model: str, root: Path, batch_size: int, steps: int) -> float:
    seed_everything(0, verbose=False)
    module = ImageClassifier(model, 10)
    network, mean, std = module.network.train(), module.mean, module.std
    transforms = ImageTransforms(image_size=32, train_crop="pad")
    data = CIFAR100DataModule(transforms=transforms, **data_options(root, batch_size, steps))
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    done, start = 0, 0.0
    while True:
        for batch in loader:
            logits = network((batch["image"] - mean) / std)
            loss = F.cross_entropy(logits, batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == WARM_UP:
                start = time.perf_counter()
            if done == WARM_UP + steps:
                return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["test_resnet", "resnet18"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["PL_GLOBAL_SEED"] = "0"
    print(
        f"{'model':<14}{'featherlight':>14}{'bare loop':>14}{'ratio':>8}   ms a step, batch "
        f"{options.batch_size}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            pairs = []
            for _ in range(options.repeats):
                arguments = (model, Path(folder), options.batch_size, options.steps)
                pairs.append((through_featherlight(*arguments), bare_loop(*arguments)))
            ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = [a / b for a, b in pairs]
            print(
                f"{model:<14}{1e3 * ours:>14.2f}{1e3 * bare:>14.2f}{statistics.median(ratios):>8.3f}"
                f"   ratios {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
            )


if __name__ == "__main__":
    main()
