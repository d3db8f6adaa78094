import timm
import torch
from torch import nn

from lightning_modules.parts.normalize import (
    knows_statistics,
    normalized,
    register_normalization,
    restored,
    trained_statistics,
)

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


def test_by_numbers_and_by_buffers_and_back():
    images, module = torch.rand(2, 3, 4, 5), nn.Module()
    register_normalization(module, MEAN, STD)
    assert not module.state_dict()
    wanted = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    for statistics in ((MEAN, STD), (module.mean, module.std)):
        assert torch.equal(normalized(images, *statistics), wanted)
        torch.testing.assert_close(restored(wanted, *statistics), images)
    assert torch.equal(normalized(images[0], MEAN, STD), wanted[0]), "a single image too"
    assert normalized(images.bfloat16(), MEAN, STD).dtype == torch.bfloat16


def test_what_timm_says_of_a_network():
    network = timm.create_model("test_vit")
    assert knows_statistics(network)
    assert trained_statistics(network) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not knows_statistics(nn.Linear(2, 2))
