"""The plain average of weights, without a decay."""

import torch
from torch import nn

from lightning_modules.parts.averaging import AveragedWeights


def test_the_average_is_the_mean_of_all_models():
    models = [nn.Linear(2, 1) for _ in range(3)]
    average = AveragedWeights(models[0])
    for model in models:
        average.update_parameters(model)
    expected = torch.stack([model.weight.detach() for model in models]).mean(0)
    torch.testing.assert_close(average.module.weight.detach(), expected)
