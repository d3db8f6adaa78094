import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn

from callbacks.token_reduction.network import CompressingBlock, attend
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.state import TokenState


class LeaveAll(Reducer):
    """Claims to remove a token, so that the block takes its own path, and removes none."""

    needs_class_token = False

    def keeps(self, tokens, prefix):
        return tokens - 1

    def reduce(self, block, x, evidence, state):
        return x


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True, "attn_head_dim": 8}]
)
def test_attend_is_timms_attention(options, fused):
    attention = Attention(24, num_heads=3, qkv_bias=True, norm_layer=nn.LayerNorm, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    attention.fused_attn = fused
    x, bias = torch.randn(2, 9, 24), torch.randn(2, 1, 1, 9)
    out, evidence = attend(attention, x, bias)
    torch.testing.assert_close(out, attention(x, attn_mask=bias))
    logits = evidence.queries @ evidence.keys.transpose(-1, -2) * evidence.scale + evidence.bias
    assert logits.shape == (2, 3, 9, 9)
    assert evidence.values.shape == (2, 3, 9, 8)


@pytest.mark.parametrize("training", [True, False])
def test_a_compressing_block_is_timms_block_around_the_rule(training):
    block = Block(24, 3, qkv_bias=True, init_values=0.5, drop_path=0.5, proj_drop=0.2, attn_drop=0.2).train(
        training
    )
    x = torch.randn(4, 9, 24)
    torch.manual_seed(7)
    expected = block(x)
    block.__class__ = CompressingBlock
    block.block_index, block.token_reducer = 0, LeaveAll()
    torch.manual_seed(7)
    torch.testing.assert_close(block(x, state=TokenState(prefix=1)), expected)
