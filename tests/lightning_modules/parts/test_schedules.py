from functools import partial
from itertools import pairwise

import pytest
import torch

from lightning_modules.classification import ImageClassifier
from lightning_modules.parts.schedules import WarmupSchedule


def rates(steps, epochs, steps_per_epoch, lr=0.4, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = WarmupSchedule(optimizer, **options)
    schedule.bind(epochs, steps_per_epoch)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_by_epoch_is_not_shifted_by_the_warm_up():
    found = rates(6, 10, 7, interval="epoch", warmup_epochs=2, warmup_lr=1e-4, min_lr=1e-3)
    cosine = [
        1e-3 + (0.4 - 1e-3) / 2 * (1 + torch.cos(torch.tensor(torch.pi * e / 10)).item()) for e in range(6)
    ]
    assert found == pytest.approx([1e-4, 1e-4 + (0.4 - 1e-4) / 2, *cosine[2:]], rel=1e-6)


def test_steps_reach_min_lr_at_the_end_of_the_run():
    found = rates(21, 4, 5, min_lr=0.01)
    assert found[0] == pytest.approx(0.4)
    assert found[20] == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(found))


def test_step_decay_and_constant():
    assert rates(3, 3, 1, interval="epoch", kind="step", decay_epochs=2) == pytest.approx([0.4, 0.4, 0.04])
    assert rates(4, 4, 1, interval="epoch", kind="constant", warmup_epochs=2) == pytest.approx(
        [0, 0.2, 0.4, 0.4]
    )


def test_the_position_survives_a_checkpoint():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    first = WarmupSchedule(optimizer, warmup_epochs=1)
    first.bind(4, 5)
    for _ in range(8):
        optimizer.step()
        first.step()
    rate = optimizer.param_groups[0]["lr"]
    again = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    second = WarmupSchedule(again, warmup_epochs=1)
    second.bind(4, 5)
    second.load_state_dict(first.state_dict())
    assert again.param_groups[0]["lr"] == rate
    assert second.get_last_lr() == [rate]


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs: 5.* longer than the run \(3\)"):
        rates(1, 3, 1, warmup_epochs=5)


def test_a_fractional_warm_up_needs_steps():
    with pytest.raises(ValueError, match=r"warmup_epochs: 0.5 is not whole"):
        rates(1, 3, 1, interval="epoch", warmup_epochs=0.5)


def test_max_steps_ends_the_schedule_where_it_ends_the_run(trainer, blob_data):
    module = ImageClassifier(
        "test_vit",
        num_classes=4,
        model_args={"img_size": 32},
        optimizer=partial(torch.optim.SGD, lr=0.4),
        lr_scheduler=partial(WarmupSchedule, min_lr=0.01),
    )
    run = trainer(max_epochs=100, max_steps=6)  # an epoch has 4 steps
    run.fit(module, blob_data())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
