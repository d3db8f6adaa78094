"""Training GenDet on cached features against computing the frozen encoder's features in every epoch.

    python benchmarks/speed.py gendet [--model resnet18] [--image-size 64] [--images 240] [--repeats 3]

Both train the same module on the same images through the Trainer, with one epoch of each stage; the first
turns are interleaved. Caching costs one pass of its own, which is timed too, so the table says after how many
epochs it pays. Process CPU time (wall beside it) with one thread; peak memory from processes of their own.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from common import in_own_process, peak_mebibytes, ratios, turns, write_numbers
from lightning.pytorch import Trainer, seed_everything

from datamodules import FakeImagesDataModule, FakeImageTransforms
from datamodules.samples import write_fake_images
from lightning_modules import GenDet, ImageEncoder, StageSchedule

Times = dict[str, list[tuple[float, float]]]  # seconds of (CPU, wall)
SCHEDULE = StageSchedule(1, 1, 1)
WAYS = ("cached", "uncached")


def parts(options: argparse.Namespace, folder: Path, cached: bool) -> tuple[GenDet, FakeImagesDataModule]:
    """The module and its data."""
    encoder = ImageEncoder(options.model, "timm", None)
    data = FakeImagesDataModule(
        root=folder / "data",
        dataset="genimage",
        train_on=["nearest"],
        transforms=FakeImageTransforms(image_size=options.image_size, augmentation="none"),
        cache=folder / "features" if cached else None,
        val_fraction=0.1,
        batch_size=options.batch_size,
        num_workers=0,
    )
    return GenDet(encoder, SCHEDULE), data


def fit(options: argparse.Namespace, folder: Path, cached: bool) -> tuple[float, float]:
    """Seconds of (CPU, wall) of one `fit` without validation, set-up included."""
    seed_everything(0, verbose=False)
    module, data = parts(options, folder, cached)
    trainer = Trainer(
        accelerator=options.device,
        devices=1,
        max_epochs=SCHEDULE.total,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.fit(module, datamodule=data)
    return time.process_time() - cpu, time.perf_counter() - wall


def measured(options: argparse.Namespace, folder: Path) -> Times:
    """`filling` (with an empty cache, once), then both ways in turn."""
    times: Times = {"filling": [fit(options, folder, True)], **{way: [] for way in WAYS}}
    for way in turns(WAYS[::-1], options.repeats):
        times[way].append(fit(options, folder, way == "cached"))
    return times


def peak_megabytes(options: argparse.Namespace, folder: Path, way: str) -> float:
    """Peak resident memory of a process that trains one way, minus that of one that only imports."""

    def run(what: str) -> float:
        line = ["--memory-of", what, "--folder", folder, "--model", options.model]
        line += ["--image-size", options.image_size, "--batch-size", options.batch_size]
        return float(in_own_process(__file__, *line, "--device", options.device))

    return run(way) - run("nothing")


def report(times: Times, options: argparse.Namespace) -> dict[str, object]:
    """Print medians and ratios; the same as a dictionary."""
    cpu = {name: statistics.median(pair[0] for pair in pairs) for name, pairs in times.items()}
    wall = {name: statistics.median(pair[1] for pair in pairs) for name, pairs in times.items()}
    uncached, cached = ([cpu for cpu, _ in times[way]] for way in ("uncached", "cached"))
    by_round = sorted(ratios(uncached, cached))
    epochs = SCHEDULE.total
    print(f"{options.images} images of {options.image_size} px, {options.model}, {epochs} epochs a run")
    print(f"{'':<10}{'CPU s/run':>11}{'wall s/run':>12}")
    for name in times:
        print(f"{name:<10}{cpu[name]:>11.2f}{wall[name]:>12.2f}")
    ratio, fill = cpu["uncached"] / cpu["cached"], cpu["filling"] - cpu["cached"]
    saved = (cpu["uncached"] - cpu["cached"]) / epochs
    pays = fill / saved if saved > 0 else float("inf")
    spread = f"{by_round[0]:.2f}-{by_round[-1]:.2f}"
    print(f"uncached / cached: {ratio:.2f} ({spread}, {len(by_round)} repeats), CPU time")
    print(f"filling the cache costs {fill:.2f} s once and pays after {pays:.1f} epochs; a recipe has 50")
    full = StageSchedule().total
    whole = full * cpu["uncached"] / epochs / (fill + full * cpu["cached"] / epochs)
    print(f"a whole recipe of {full} epochs, filling included: {whole:.1f} times faster")
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "ratio": ratio,
        "ratios": by_round,
        "whole_recipe": whole,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18", help="of timm, random weights: the cost is the same")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=240, help="real, and as many generated")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parsed()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory_of:
        if options.memory_of != "nothing":
            fit(options, options.folder, options.memory_of == "cached")
        print(peak_mebibytes())
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = -(-options.image_size // 8) * 8
        write_fake_images(folder / "data", "genimage", options.images, side, ["nearest"])
        found = report(measured(options, folder), options)
        memory = {way: peak_megabytes(options, folder, way) for way in WAYS}
    print("peak memory of training: " + ", ".join(f"{way} {value:.0f} MiB" for way, value in memory.items()))
    write_numbers(options.json, {**found, "memory_mebibytes": memory})
    return 0


if __name__ == "__main__":
    sys.exit(main())
