"""The drop-in files, and what they say beside the paper's table."""

from pathlib import Path

import pytest
import yaml

import callbacks.pruning

CONFIGS = Path(__file__).parents[3] / "configs" / "callbacks"


@pytest.mark.parametrize("name", ["magnitude_pruning", "rpg", "rpg_80", "rpg_90", "rpg_95", "rpg_98", "rigl"])
def test_drop_in_builds(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert isinstance(
        getattr(callbacks.pruning, config["class_path"])(**config["init_args"]),
        callbacks.pruning.PruningCallback,
    )


@pytest.mark.parametrize(
    ("sparsity", "rank_weight", "tolerance", "kept"),
    [(80, 0.5, 0.2, 5_100_583), (90, 0.5, 0.1, 2_550_292), (95, 3, 0.2, 1_275_147), (98, 4, 0.2, 510_059)],
)
def test_published_settings(sparsity, rank_weight, tolerance, kept):
    config = yaml.safe_load((CONFIGS / f"rpg_{sparsity}.yaml").read_text())
    pruning = callbacks.pruning.RankPruning(**config["init_args"])
    assert (pruning.rank_weight, pruning.rank_tolerance) == (rank_weight, tolerance)
    plan = pruning.timetable(125_100)
    assert (plan.updates_to_target, plan.topology_end_step) == (1125, 112_715)
    total = 25_502_912
    assert total - round((1 - pruning.final_density) * total) + 1 == kept
