import pytest
import torch

from lightning_modules.parts.schedules import WarmupSchedule

CIFAR = {"warmup_lr": 1e-4, "warmup_epochs": 3, "min_lr": 1e-3}
TOKENS = {"warmup_lr": 5e-7, "warmup_epochs": 20}
# section 3 of the paper's appendix: (peak rate, epochs, options)
RECIPES = {
    "cifar_cnn": (0.05, 300, {**CIFAR}),
    "cifar_vit_mlp": (5e-4, 300, {**TOKENS, "min_lr": 1e-5}),
    "imagenet_cnn": (0.1, 100, {"kind": "step", "warmup_lr": 1e-4, "warmup_epochs": 3, "decay_epochs": 30}),
    "imagenet_vit_mlp": (5e-4, 300, {**TOKENS, "min_lr": 1e-6}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_rates_are_golden(recipe, golden):
    rate, epochs, options = RECIPES[recipe]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = WarmupSchedule(optimizer, interval="epoch", **options)
    schedule.bind(epochs, 10)
    assert set(golden["lr"]) == set(RECIPES)
    for epoch, wanted in golden["lr"][recipe].items():
        schedule.step(int(epoch))
        assert schedule.get_last_lr()[0] == pytest.approx(wanted, rel=1e-6)
