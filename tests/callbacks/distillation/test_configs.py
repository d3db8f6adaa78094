from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from callbacks.distillation import BKD, CC, CRD, DIST, DKD, KD, OFA, RKD, DistillationTeacher, FitNet

FOLDER = Path(__file__).parents[3] / "configs" / "callbacks"
CRITERIA = [OFA, KD, BKD, DKD, DIST, FitNet, CC, RKD, CRD]


@pytest.fixture
def callbacks_of():
    """The callbacks that the command line makes of drop-in files."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")

    def parse(*files: Path, options: tuple[str, ...] = ()) -> list[DistillationTeacher]:
        config = parser.parse_args([*(f"--trainer.callbacks+={file}" for file in files), *options])
        own = parser.instantiate_classes(config).trainer.callbacks
        return [callback for callback in own if isinstance(callback, DistillationTeacher)]

    return parse


@pytest.mark.parametrize("criterion", CRITERIA)
def test_drop_ins_differ_in_the_criterion_alone(criterion, callbacks_of):
    name = criterion.__name__.lower()
    (callback,) = callbacks_of(FOLDER / f"{name}.yaml")
    assert [type(found) for found in callback.criteria] == [criterion]
    assert callback.name == name
    assert callback.criteria[0].settings() == criterion().settings()
    assert (callback.teacher, callback.weights) == ("swin_tiny_patch4_window7_224.ms_in1k", "pretrained")


def test_two_drop_ins_are_two_objectives_of_one_teacher(callbacks_of):
    first, second = callbacks_of(FOLDER / "ofa.yaml", FOLDER / "fitnet.yaml")
    assert (first.name, second.name) == ("ofa", "fitnet")
    assert first.source == second.source


def test_the_teacher_of_a_drop_in_is_one_option(callbacks_of):
    prefix = "--trainer.callbacks.init_args"
    options = (
        f"{prefix}.teacher=resnet50",
        f"{prefix}.weights=null",
        f"{prefix}.criterion.init_args.gamma=1.3",
    )
    (callback,) = callbacks_of(FOLDER / "ofa.yaml", options=options)
    assert (callback.teacher, callback.weights) == ("resnet50", None)
    assert callback.criteria[0].gammas == (1.3,) * 5


def test_options_and_lists_from_yaml(callbacks_of, tmp_path):
    (tmp_path / "both.yaml").write_text(
        "class_path: DistillationTeacher\n"
        "init_args:\n"
        "  teacher:\n"
        "    class_path: torchvision.models.resnet18\n"
        "    init_args: {num_classes: 4}\n"
        "  teacher_taps: [layer1, layer2, layer3, layer4]\n"
        "  criterion:\n"
        "    - {class_path: OFA, init_args: {gamma: [1.0, 1.2], stages: [3], variant: paper}}\n"
        "    - class_path: FitNet\n"
    )
    (callback,) = callbacks_of(tmp_path / "both.yaml")
    assert callback.teacher.fc.out_features == 4
    assert callback.criteria[0].settings() == {"stages": [3], "gamma": [1.0, 1.2], "variant": "paper"}
    assert callback.name == "ofa_fitnet"
