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


def test_captions_of_other_data_are_refused():
    module, given = LightCLIP(SMALL), batch()
    longer = torch.nn.functional.pad(given["input_ids"], (0, 40))
    with pytest.raises(OptionError, match=r"context_length=\d+: the captions of the data have 52 tokens"):
        module.compute({**given, "input_ids": longer})
    with pytest.raises(OptionError, match="no end token 59: they are of another tokenizer"):
        module.compute({**given, "input_ids": given["input_ids"].clamp(max=58)})


def test_scalars_of_other_files_are_read_as_temperatures():
    module = LightCLIP(SMALL)
    assert min(parameter.ndim for parameter in module.parameters()) == 1  # FSDP shards no scalar
    state = {name: torch.full((), 3.0) if "scale" in name else t for name, t in module.state_dict().items()}
    module.load_state_dict(state)
    assert module.network.token_align.logit_scale.tolist() == [3.0]
    assert module.network.inference_state()["logit_scale"].shape == ()


def test_a_weight_of_zero_builds_nothing():
    module = LightCLIP(SMALL, w_tok=0, w_mlm=0)
    assert set(step(module)[0]) == {"instance"}
    assert set(module.network.inference_state()) == set(module.network.state_dict())
    with pytest.raises(OptionError, match="w_ins"):
        LightCLIP(SMALL, w_ins=0, w_tok=0, w_mlm=0)
