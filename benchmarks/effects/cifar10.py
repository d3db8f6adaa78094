"""Real photographs for the effect experiments: CIFAR-10 as an image folder, and the recipes that use it.

The data is a folder or archive with `train/<class>/*` and `test/<class>/*`; the published numbers were made
with 3,000 training and 600 test images a class. The students see the first 1,000 training images of each
class, the teacher all.
"""

import argparse
import tarfile
from pathlib import Path

from harness import featherlight

HERE = Path(__file__).parent
RESNET = HERE / "cifar10_resnet.yaml"
STUDENT = HERE / "cifar10_student.yaml"
TEACHER = HERE / "cifar10_teacher.yaml"


def options(description: str | None) -> argparse.ArgumentParser:
    """Options that all experiments on CIFAR-10 share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="image folder or .tar.gz of one")
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/cifar10"), help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    return parser


def prepare(data: Path, runs: Path, per_class: int = 1000) -> tuple[Path, Path]:
    """The whole data set and one with fewer training images, unpacked or linked under `runs` once.

    Args:
        data: image folder or archive.
        runs: where to put it.
        per_class: training images a class of the smaller one.

    Returns:
        Roots of the whole and the smaller data set.
    """
    whole, small = runs / "data", runs / f"data_{per_class}"
    if not whole.exists():
        runs.mkdir(parents=True, exist_ok=True)
        if data.is_dir():
            whole.symlink_to(data.resolve())
        else:
            with tarfile.open(data) as archive:
                archive.extractall(runs / "unpacked", filter="data")
            found = next(path.parent for path in (runs / "unpacked").rglob("train") if path.is_dir())
            whole.symlink_to(found.resolve())
    if not small.exists():
        for folder in sorted((whole / "train").iterdir()):
            target = small / "train" / folder.name
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:per_class]:
                (target / image.name).symlink_to(image.resolve())
        (small / "test").symlink_to((whole / "test").resolve())
    return whole, small


def teacher(whole: Path, runs: Path) -> Path:
    """Checkpoint of the teacher, a small ResNet trained on the whole data set; made once."""
    run = runs / "teacher"
    arguments = [
        "--config",
        str(RESNET),
        "--config",
        str(TEACHER),
        "--data.init_args.root",
        str(whole),
        "--ckpt_path",
        "auto",
    ]
    if not (run / "results.json").exists():
        featherlight("fit", arguments, run)
        featherlight("test", arguments, run)
    return run / "checkpoints" / "last.ckpt"
