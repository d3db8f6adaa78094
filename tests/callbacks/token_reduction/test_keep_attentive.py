import pytest
import torch

from callbacks.token_reduction import KeepAttentive
from callbacks.token_reduction.state import Evidence, TokenState


def case(prefix=1, **options):
    torch.manual_seed(3)
    queries, keys, values = torch.randn(3, 2, 3, 12, 8).unbind(0)
    x = torch.randn(2, 12, 5, requires_grad=True)
    queries.requires_grad_()
    state = TokenState(prefix, trace=True)
    attention = (queries[:, :, :1] @ keys.transpose(-1, -2) * 0.5).softmax(dim=-1).mean(dim=1)[:, 0, prefix:]
    out = KeepAttentive(**options).reduce(0, x, Evidence(queries, keys, values, 0.5, None), state)
    return x, attention, out, state, queries


def test_keeps_the_attended_in_descending_order_and_fuses_the_rest():
    x, attention, out, state, _ = case(keep_rate=0.5)
    order = attention.argsort(dim=1, descending=True)
    for image in range(2):
        kept, rest = order[image, :6], order[image, 6:]
        assert out[image, 1:7].equal(x[image, 1 + kept])
        fused = (attention[image, rest, None] * x[image, 1 + rest]).sum(dim=0)
        torch.testing.assert_close(out[image, 7], fused)
        assert state.sources[image, 7].nonzero().flatten().tolist() == sorted((1 + rest).tolist())
    assert out.shape == (2, 8, 5)


def test_fused_token_passes_a_gradient_to_the_attention():
    *_, out, _, queries = case(keep_rate=0.5)
    out[:, -1].sum().backward()
    assert queries.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"keep_rate": 0.7}, 1 + 8 + 1),
        ({"keep_rate": 0.7, "fuse": False}, 1 + 8),
        ({"r": 4}, 8),
        ({"r": 99}, 7),
    ],
)
def test_number_of_tokens(options, tokens):
    assert KeepAttentive(**options).keeps(12, 1) == tokens
    assert case(**options)[2].shape[1] == tokens


def test_a_single_token_left_over_is_not_fused_with_itself():
    assert KeepAttentive(keep_rate=0.99).keeps(12, 1) == 12


@pytest.mark.parametrize("options", [{"keep_rate": 0.0}, {"keep_rate": 1.2}, {"r": -1}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        KeepAttentive(**options)
