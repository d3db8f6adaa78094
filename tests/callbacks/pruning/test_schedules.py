import itertools
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.pruning.schedules import (
    Timetable,
    cosine_density,
    cubic_density,
    density_at,
    drop_fraction_at,
    exponential_density,
)
from lightning_modules.parts.schedules import WarmupSchedule

CONFIGS = Path(__file__).parents[3] / "configs"


def test_exponential_density_is_golden(golden):
    for case in golden["density_schedule"]:
        for k, expected in zip(case["k"], case["density"], strict=True):
            density = exponential_density(case["target_density"], k, case["num_updates_to_target"])
            assert density == pytest.approx(expected, rel=1e-8)


def test_drop_fraction_is_golden(golden):
    for case in golden["drop_fraction"]:
        for step, expected in zip(case["step"], case["drop_fraction"], strict=True):
            assert drop_fraction_at(step, case["topology_end_step"], case["alpha"]) == pytest.approx(
                expected, rel=1e-8
            )


def test_drop_fraction_falls_from_alpha_to_zero():
    values = [drop_fraction_at(step, 100, 0.3) for step in range(101)]
    assert values[0] == 0.3
    assert values[50] == pytest.approx(0.15)
    assert values[100] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("law", [exponential_density, cubic_density, cosine_density])
def test_density_falls_strictly_to_the_target(law):
    values = [law(0.02, k, 40) for k in range(43)]
    assert values[0] == 1
    assert values[40:] == [0.02] * 3
    assert all(later < earlier for earlier, later in itertools.pairwise(values[:41]))


def test_laws_in_the_middle():
    assert exponential_density(0.02, 1, 1125) == pytest.approx(0.9965287, abs=1e-7)
    assert cubic_density(0.1, 10, 20) == pytest.approx(0.1 + 0.9 / 8)
    assert cosine_density(0.1, 10, 20) == pytest.approx(0.55)


def test_warmup_keeps_everything_and_then_follows_the_same_law():
    values = [exponential_density(0.1, k, 20, warmup=0.25) for k in range(21)]
    assert values[:6] == [1] * 6
    assert values[5:] == pytest.approx([exponential_density(0.1, k, 15) for k in range(16)])


def test_imagenet_timetable():
    plan = Timetable.plan(125_100, 100, 0.9, 0.901)
    assert (plan.prune_end_step, plan.topology_end_step, plan.updates_to_target) == (112_590, 112_715, 1125)
    updates = [step for step in range(1, 125_101) if plan.is_due(step)]
    assert len(updates) == 1127
    assert updates[-1] == 112_700
    densities = {step: density_at("exponential", 0.02, step, plan) for step in updates}
    assert min(step for step, density in densities.items() if density == 0.02) == 112_600


def test_short_run_moves_the_end_of_the_topology_behind_the_target():
    plan = Timetable.plan(200, 10, 0.9, 0.901)
    assert plan.topology_end_step == 191
    assert plan.is_due(190)
    assert plan.update_index(190) == plan.updates_to_target


@pytest.mark.parametrize(("steps", "every", "prune_end"), [(100, 100, 0.9), (150, 100, 0.9), (50, 10, 0.1)])
def test_too_short_a_run_names_the_steps_it_needs(steps, every, prune_end):
    with pytest.raises(MisconfigurationException, match=f"{steps} optimiser steps is too short") as error:
        Timetable.plan(steps, every, prune_end, 1.0)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    Timetable.plan(needed, every, prune_end, 1.0)
    with pytest.raises(MisconfigurationException):
        Timetable.plan(needed - 1, every, prune_end, 1.0)


def test_pruning_until_the_very_end_is_refused():
    with pytest.raises(MisconfigurationException, match="lower prune_end"):
        Timetable.plan(1000, 100, 1.0, 1.0)


def test_the_recipe_has_the_published_learning_rate(golden):
    """Linear warm-up per iteration, then half a cosine; the release counts iterations from 1, timm from 0."""
    recipe = yaml.safe_load((CONFIGS / "rpg" / "resnet50_imagenet.yaml").read_text())
    model, epochs = recipe["model"]["init_args"], recipe["trainer"]["max_epochs"]
    for case in golden["lr_schedule"]:
        assert (model["optimizer"]["init_args"]["lr"], epochs) == (case["base"], case["epochs"])
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=case["base"])
        schedule = WarmupSchedule(optimizer, **model["lr_scheduler"]["init_args"])
        schedule.bind(epochs, case["steps_per_epoch"])
        for (epoch, iteration), expected in zip(case["points_epoch_iter"], case["lr"], strict=True):
            schedule.step(epoch * case["steps_per_epoch"] + iteration + 1)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-8, abs=1e-12)
