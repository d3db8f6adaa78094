"""Cached features: the undivided batch's values and gradients."""

import torch
from torch import nn

from lightning_modules.parts.cached import cached_features


def gradients(network, batch, size):
    network.zero_grad()

    def encode(part):
        return {"a": network[0](part["x"]), "b": network[1](part["x"]).square(), "key": part["y"]}

    torch.manual_seed(3)
    found = encode(batch) if size is None else cached_features(encode, batch, size, network)
    loss = (found["a"] @ found["b"].T).logsumexp(1).mean() + network[2](found["a"]).mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in network.parameters()], found["key"]


def test_equal_to_the_undivided_batch():
    torch.manual_seed(0)
    network = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 1)]).double()
    batch = {"x": torch.randn(11, 6, dtype=torch.float64), "y": torch.arange(11)}
    whole, parts = gradients(network, batch, None), gradients(network, batch, 4)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


def test_random_numbers_and_running_statistics_count_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    batch = {"x": torch.randn(8, 6)}
    outputs = []

    def encode(part):
        outputs.append(network(part["x"]))
        return {"f": outputs[-1]}

    cached_features(encode, batch, 4, network)["f"].sum().backward()
    torch.testing.assert_close(outputs[:2], outputs[2:])
    assert int(network[1].num_batches_tracked) == 2
