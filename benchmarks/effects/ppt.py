"""Accuracy against MACs of PPT, ToMe and EViT, off the shelf, on a small ViT trained on real images.

    python benchmarks/effects/ppt.py --data cifar10_subset.tar.gz

One ViT a seed, trained once; then each method tests it at three budgets of MACs (`target_macs`), without
fine-tuning. PPT's threshold is chosen for each budget on photographs that no network was trained on and no
test counts: the next 100 of the training images of each class, mean over the seeds.
"""

import logging
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from cifar10 import HERE, options, prepare
from harness import fit_and_test, spread, table, top1
from lightning.pytorch import Callback, Trainer

from callbacks import EViT, TokenPruningPooling, ToMe
from callbacks.token_reduction import VitShape
from datamodules import ImageFolderDataModule, ImageTransforms
from lightning_modules import ImageClassifier
from lightning_modules.parts.weights import load_weights

RECIPE = HERE / "cifar10_vit.yaml"
BLOCKS = [1, 2, 3]
MODEL = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2}
THRESHOLDS = (0.0, 3e-5, 6e-5, 1e-4, 2e-4, float("inf"))
TRAINED_ON, HELD_OUT = 1000, 100  # images of a class


def network(checkpoint: Path) -> ImageClassifier:
    """The trained ViT."""
    module = ImageClassifier("vit_tiny_patch16_224", 10, model_args=MODEL)
    load_weights(module.network, checkpoint)
    return module


def held_out(whole: Path, runs: Path) -> Path:
    """A data set of the training images that come after those that the networks saw; linked once."""
    root = runs / f"data_{TRAINED_ON}_next_{HELD_OUT}"
    if not root.exists():
        for folder in sorted((whole / "train").iterdir()):
            target = root / "test" / folder.name
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[TRAINED_ON : TRAINED_ON + HELD_OUT]:
                (target / image.name).symlink_to(image.resolve())
    return root


def accuracy(module: ImageClassifier, data: ImageFolderDataModule, callbacks: Iterable[Callback]) -> float:
    """Test accuracy under a callback, through the Trainer."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    )
    return float(trainer.test(module, datamodule=data, verbose=False)[0]["test/top1"])


def images(root: Path) -> ImageFolderDataModule:
    """The test images of a data set."""
    transforms = ImageTransforms(image_size=32, train_crop="pad")
    return ImageFolderDataModule(root=root, batch_size=250, num_workers=0, transforms=transforms)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.85, 0.7, 0.6], help="shares of the dense MACs"
    )
    chosen = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole, small = prepare(chosen.data, chosen.runs)
    recipe = ["--config", str(RECIPE), "--data.init_args.root", str(small)]
    reports = {seed: fit_and_test(recipe, recipe, chosen.runs / f"vit-{seed}", seed) for seed in chosen.seeds}
    modules = {
        seed: network(chosen.runs / f"vit-{seed}" / "checkpoints" / "last.ckpt") for seed in chosen.seeds
    }
    dense = VitShape.of(modules[chosen.seeds[0]].network).macs()
    test, validation = images(whole), images(held_out(whole, chosen.runs))
    rows = [["none", f"{dense / 1e6:.2f} M", spread([top1(report) for report in reports.values()], 100), ""]]
    for budget in chosen.budgets:
        macs = budget * dense

        def ppt(threshold: float, macs: float = macs) -> TokenPruningPooling:
            return TokenPruningPooling(BLOCKS, threshold=threshold, target_macs=macs)

        tried = {
            threshold: statistics.mean(
                accuracy(module, validation, [ppt(threshold)]) for module in modules.values()
            )
            for threshold in THRESHOLDS
        }
        best = max(tried, key=lambda threshold: tried[threshold])
        methods = {
            f"PPT, threshold {best:g}": lambda best=best, ppt=ppt: ppt(best),
            "PPT, only pruning": lambda ppt=ppt: ppt(0.0),
            "PPT, only pooling": lambda ppt=ppt: ppt(float("inf")),
            "ToMe": lambda macs=macs: ToMe(target_macs=macs),
            "EViT": lambda macs=macs: EViT(BLOCKS, target_macs=macs),
        }
        for name, make in methods.items():
            found = [accuracy(module, test, [make()]) for module in modules.values()]
            rows.append([name, f"at most {macs / 1e6:.2f} M", spread(found, 100), f"{budget:.0%}"])
    print(table(["method", "MACs an image", "test top-1, %", "budget"], rows))


if __name__ == "__main__":
    main()
