"""The experiments on OFA-KD: their command lines mean what they say, and their tables add up."""

import argparse
import contextlib
import io
from pathlib import Path

import pytest
import timm
import torch

from callbacks.distillation import OFA, DistillationTeacher
from featherlight_cli import make_cli

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def effects(load):
    return load("ofakd")


@pytest.fixture
def speed(load):
    return load("speed_ofakd")


def distillation(arguments, folder):
    """The one DistillationTeacher that a command line builds on the students' recipe."""
    recipe = BENCHMARKS / "effects" / "cifar10_student.yaml"
    with contextlib.redirect_stdout(io.StringIO()):
        cli = make_cli(
            ["--config", str(recipe), "--trainer.default_root_dir", str(folder), *arguments], run=False
        )
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, DistillationTeacher)]


def test_variants_differ_in_the_criterion(effects, tmp_path):
    variants = effects.criteria(Path("teacher.ckpt"))
    assert list(variants) == ["none", "kd", "dkd", "fitnet", "ofa"]
    assert distillation(variants.pop("none"), tmp_path) == []
    for name, arguments in variants.items():
        (callback,) = distillation(arguments, tmp_path)
        assert [criterion.label for criterion in callback.criteria] == [name]
        assert (callback.teacher, str(callback.weights)) == (None, "teacher.ckpt")


def test_the_grid_sets_gamma_and_weight(effects, tmp_path):
    grid = effects.grid(Path("teacher.ckpt"))
    assert len(grid) == 9
    (callback,) = distillation(grid["ofa_gamma1.4_weight0.3"], tmp_path)
    (criterion,) = callback.criteria
    assert isinstance(criterion, OFA)
    assert (criterion.gammas, criterion.ofa_weight) == ((1.4,) * 5, 0.3)
    (callback,) = distillation(effects.criteria(Path("teacher.ckpt"))["ofa"], tmp_path)
    (criterion,) = callback.criteria
    assert (criterion.gammas, criterion.ofa_weight) == ((1.0,) * 5, 1.0), "the cell that shares its runs"


def test_gains_are_paired_by_seed(effects):
    def reports(*values):
        return [{"metrics": {"test/top1": value}} for value in values]

    text = effects.comparison({"none": reports(0.5, 0.6), "ofa": reports(0.53, 0.61)})
    assert "| ofa | 57.00 (53.00-61.00) | 2.00 (1.00-3.00) |" in text
    cells = {name: reports(0.5) for name in effects.grid(Path("x"))}
    cells[effects.place(1.2, 0.1)] = reports(0.7)
    assert "| 1.2 | 70.00 (70.00-70.00) | 50.00 (50.00-50.00) |" in effects.sweep_table(cells)


def test_every_variant_is_timed_through_the_trainer(speed):
    options = argparse.Namespace(
        student="test_resnet",
        classes=5,
        image_size=32,
        batch_size=2,
        warm_up=1,
        steps=2,
        threads=1,
        device="cpu",
        precision="32-true",
    )
    torch.manual_seed(0)
    teacher = timm.create_model("test_convnext", num_classes=5)
    found = {name: [speed.fit(criteria(), teacher, options)] for name, criteria in speed.VARIANTS.items()}
    alone, kd, ofa, both = (runs[0] for runs in found.values())
    assert alone.teacher == 0 < kd.teacher < kd.step
    assert alone.parameters == kd.parameters < ofa.parameters < both.parameters
    assert min(run.memory for run in (alone, kd, ofa, both)) > 10
    assert len(speed.report(found).splitlines()) == 2 + len(speed.VARIANTS)
