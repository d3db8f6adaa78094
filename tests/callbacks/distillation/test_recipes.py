"""The published pairs: every row of the tables has its recipe, and student and teacher fit together."""

import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import yaml

import lightning_modules.parts.students  # noqa: F401  (makes swin_nano and swin_pico known to timm)
from callbacks.distillation import OFA, FitNet
from callbacks.distillation.criterion import TrainingSet
from callbacks.distillation.taps import NetworkTaps

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "configs" / "ofakd"
PAIRS = sorted((FOLDER / "cifar100").glob("*.yaml")) + sorted((FOLDER / "imagenet").glob("*.yaml"))
PAGE = (REPOSITORY / "callbacks" / "distillation" / "README.md").read_text()
ROW = re.compile(
    r"^\| `(\w+)`(?: \([\d.]+\))? \| `(\w+)` \| ([\d.]+) \|.*\| ([\d.]+)(†?)[^|]*\| [^|]+ \|$", re.MULTILINE
)
PUBLISHED_GAMMAS = {"cifar100/swin_tiny__resnet18": 1.0, "imagenet/deit_tiny__resnet18": 1.5}
STRONGER = {"imagenet/vit_base__resnet50", "imagenet/resnet152__resnet50"}


def name(path):
    return f"{path.parent.name}/{path.stem}"


def distillation(path):
    (callback,) = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
    assert callback["class_path"] == "DistillationTeacher"
    criteria = callback["init_args"]["criterion"]
    return callback["init_args"], criteria if isinstance(criteria, list) else [criteria]


def test_every_row_of_the_tables_has_its_file():
    cifar, imagenet = PAGE.split("ImageNet-1K († with FitNet):")
    rows = {f"cifar100/{row[0]}__{row[1]}": row for row in ROW.findall(cifar)}
    rows |= {f"imagenet/{row[0]}__{row[1]}": row for row in ROW.findall(imagenet)}
    assert (len(ROW.findall(cifar)), len(ROW.findall(imagenet))) == (12, 15)
    assert set(rows) | STRONGER == {name(path) for path in PAIRS}
    for path in PAIRS:
        if name(path) in STRONGER:
            continue
        _, _, alone, published, dagger = rows[name(path)]
        assert f"Published: {alone} alone, {published} with OFA" in path.read_text()
        kinds = [criterion["class_path"] for criterion in distillation(path)[1]]
        assert kinds == (["OFA", "FitNet"] if dagger else ["OFA"])


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_gammas_are_the_published_ones_or_marked(path):
    gamma = distillation(path)[1][0]["init_args"]["gamma"]
    assert gamma == PUBLISHED_GAMMAS.get(name(path), 1.0)
    assert ("# gamma: not published" in path.read_text()) == (name(path) not in PUBLISHED_GAMMAS)


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_student_and_teacher_fit(path):
    """Exit branches and projections can be built for the shapes at 224 pixels, on the meta device."""
    recipe, (arguments, criteria) = yaml.safe_load(path.read_text()), distillation(path)
    model = recipe["model"]["init_args"]["model"]
    assert recipe["data"]["init_args"]["transforms"]["model"] == model
    assert recipe["trainer"]["default_root_dir"] == f"runs/ofakd/{name(path)}"
    assert model.startswith(path.stem.partition("__")[2])
    assert arguments["teacher"].startswith(path.stem.partition("__")[0])
    if path.parent.name == "imagenet":
        classes = 1000
        assert arguments["weights"] == "pretrained"
        assert timm.is_model_pretrained(arguments["teacher"])
    else:
        classes = 100
        assert arguments["weights"] == f"teachers/{arguments['teacher']}_cifar100.pth"
    student, teacher = shapes(model, classes), shapes(arguments["teacher"], classes)
    for criterion in criteria:
        built = {"OFA": OFA, "FitNet": FitNet}[criterion["class_path"]](**criterion["init_args"])
        with torch.device("meta"):
            built.build(student, teacher, TrainingSet())
        assert set(built.projector) == {"1", "2", "3", "4"}


@cache
def shapes(model, classes):
    with torch.device("meta"), torch.no_grad():
        network = timm.create_model(model, num_classes=classes).eval()
        taps = NetworkTaps(network, name=model)
        taps.watch([1, 2, 3, 4], penultimate=True)
        return taps.shapes(taps.collect(network(torch.zeros(1, 3, 224, 224))))
