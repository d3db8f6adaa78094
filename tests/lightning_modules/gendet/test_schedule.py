import pytest

from lightning_modules.gendet.schedule import LABELS, StageSchedule


def stages(schedule):
    return [schedule.stage(epoch) for epoch in range(schedule.total)]


def test_the_order_of_the_paper():
    found = stages(StageSchedule(2, 3, 1))
    assert found == ["teacher"] * 2 + ["real", "fake", "augment"] * 3 + ["classifier"]
    assert [StageSchedule(2, 3, 1).rotation_of(e) for e in range(12)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert StageSchedule().total == 50


def test_ablations_leave_stages_out():
    assert stages(StageSchedule(1, 2, 1, use_augmenter=False)) == [
        *("teacher", "real", "fake", "real", "fake", "classifier")
    ]
    assert stages(StageSchedule(1, 2, 1, use_fake_stage=False)) == ["teacher", "real", "real", "classifier"]
    assert stages(StageSchedule(2, 0, 0)) == ["teacher", "teacher"]


def test_past_the_end_it_stays():
    assert StageSchedule(1, 1, 1).stage(99) == "classifier"
    assert StageSchedule(1, 1, 0).stage(99) == "augment"
    assert StageSchedule(1, 0, 0).stage(99) == "teacher"


def test_labels():
    assert LABELS["real"] == (0,)
    assert LABELS["fake"] == LABELS["augment"] == (1,)
    assert LABELS["teacher"] == LABELS["classifier"] == (0, 1)


def test_faults():
    with pytest.raises(ValueError, match="rotations"):
        StageSchedule(rotations=-1)
    with pytest.raises(ValueError, match="no epoch"):
        StageSchedule(0, 0, 0)
