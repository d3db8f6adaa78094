import pytest
import timm
import torch
from timm.layers.attention import Attention

from callbacks.measure.macs import count_macs
from callbacks.token_reduction import (
    KeepAttentive,
    MergeSimilar,
    PruneOrPool,
    VitShape,
    attach_reducers,
    smallest_r,
)


@pytest.fixture(scope="module")
def deit_small():
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224")


def ppt(r):
    return {block: PruneOrPool(r) for block in (3, 6, 9)}


def test_published_points_of_deit_small(deit_small):
    shape = VitShape.of(deit_small)
    table = {0: 4_598_882_304, 20: 3_916_621_824, 50: 2_940_979_200}
    assert {r: shape.macs(ppt(r)) for r in table} == table
    assert shape.tokens_after_blocks(ppt(50)) == [197] * 3 + [147] * 3 + [97] * 3 + [49] * 3
    every_block = {r: shape.macs({block: MergeSimilar(r) for block in range(12)}) for r in (8, 12, 16)}
    assert {r: round(macs / 1e9, 4) for r, macs in every_block.items()} == {8: 3.4165, 12: 2.8439, 16: 2.2909}


@pytest.mark.parametrize(
    "options",
    [{}, {"distilled": True}, {"reg_tokens": 2}, {"attn_layer": "attn", "mlp_ratio": 2.5, "qkv_bias": False}],
)
def test_unreduced_formula_is_what_is_counted(make_vit, options):
    network = make_vit(**options)
    assert VitShape.of(network).macs() == count_macs(network, torch.randn(1, 3, 32, 32)).total


def test_attention_narrower_than_the_network(make_vit):
    network = make_vit()
    for block in network.blocks:
        block.attn = Attention(48, num_heads=3, attn_head_dim=8, gated=True)
    assert VitShape.of(network).macs() == count_macs(network, torch.randn(1, 3, 32, 32)).total


@pytest.mark.parametrize("rule", [PruneOrPool(5, policy="prune"), MergeSimilar(5), KeepAttentive(0.5)])
def test_reduced_formula_leaves_only_scores_and_matching_out(make_vit, rule):
    network = make_vit()
    expected = VitShape.of(network).macs({1: rule, 3: rule})
    attach_reducers(network, {1: rule, 3: rule})
    counted = count_macs(network, torch.randn(1, 3, 32, 32)).total
    assert expected <= counted <= expected + 2 * 8 * 8 * 16  # all pairs, in two blocks


def test_smallest_r_for_a_budget(deit_small):
    shape = VitShape.of(deit_small)
    r = smallest_r(shape, 2.9e9, ppt)
    assert shape.macs(ppt(r)) <= 2.9e9 < shape.macs(ppt(r - 1))
    assert smallest_r(shape, shape.macs(ppt(50)), ppt) == 50
    assert smallest_r(shape, 1e12, ppt) == 0


def test_a_budget_out_of_reach_says_how_far_it_goes(deit_small):
    with pytest.raises(ValueError, match=r"target_macs=1e\+09 .*2\.2\d+e\+09"):
        smallest_r(VitShape.of(deit_small), 1e9, ppt)
