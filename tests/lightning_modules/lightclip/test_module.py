"""A step of the module: its terms, what a weight of 0 leaves out, and a batch computed in parts."""

import pytest
import torch

from lightning_modules.lightclip.matching import Matching
from lightning_modules.lightclip.module import LightCLIP
from lightning_modules.parts.options import OptionError
from tests.lightning_modules.lightclip.test_network import SMALL


def batch(count=6):
    stream = torch.Generator().manual_seed(0)
    text = torch.randint(1, 58, (count, 12), generator=stream)
    text[:, 0], text[:, 9:] = 58, 0
    text[torch.arange(count), 3 + torch.arange(count) % 6] = 59
    return {"image": torch.rand(count, 3, 64, 64, generator=stream), "input_ids": text}


def step(module):
    torch.manual_seed(1)
    module.zero_grad()
    terms = module.losses(module.compute(batch()), batch())
    sum(terms.values()).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    return {name: value.detach() for name, value in terms.items()}, gradients


@pytest.mark.parametrize("capacity", [None, 1])
def test_parts_have_the_gradients_of_the_batch(capacity):
    torch.manual_seed(0)
    module = LightCLIP(SMALL, matching=Matching(capacity=capacity))
    module.network.visual.eval()  # batch norm would take the statistics of a part
    whole = step(module)
    module.micro_batch = 2
    parts = step(module)
    assert set(whole[0]) == {"instance", "token", "masked"}
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1], atol=1e-5, rtol=1e-4)


def test_a_weight_of_zero_builds_nothing():
    module = LightCLIP(SMALL, w_tok=0, w_mlm=0)
    assert set(step(module)[0]) == {"instance"}
    assert set(module.network.inference_state()) == set(module.network.state_dict())
    with pytest.raises(OptionError, match="w_ins"):
        LightCLIP(SMALL, w_ins=0, w_tok=0, w_mlm=0)
