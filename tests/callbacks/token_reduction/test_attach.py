import copy
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

from callbacks.token_reduction import (
    KeepAttentive,
    MergeSimilar,
    PruneOrPool,
    attach_reducers,
    detach_reducers,
    record_tokens,
)

MIXED = 0.022  # some of the images of the fixture pool in block 1, some prune


def rules(threshold=MIXED, r=4, blocks=(1, 3), **options):
    return {block: PruneOrPool(r, threshold, **options) for block in blocks}


def patched(network, *arguments, **options):
    attach_reducers(network, *(arguments or (rules(),)), **options)
    return network


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


# Leaving the network as it is


@pytest.mark.parametrize(
    "options", [{}, {"distilled": True}, {"reg_tokens": 3}, {"init_values": 0.1, "qk_norm": True}]
)
def test_removing_nothing_changes_nothing(make_vit, images, options):
    network = make_vit(**options)
    before = network(images)
    close(patched(network, rules(r=0))(images), before)


def test_unpatching_restores_the_network_bit_for_bit(make_vit, images):
    network = make_vit(distilled=True)
    before, kind = network(images), type(network)
    attributes = [set(vars(part)) for part in network.modules()]
    keys = list(network.state_dict())
    attach_reducers(network, rules())
    assert isinstance(network, kind)
    assert all(isinstance(block, Block) for block in network.blocks)
    assert list(network.state_dict()) == keys
    assert network(images).shape == before.shape
    detach_reducers(network)
    assert type(network) is kind
    assert {type(block) for block in network.blocks} == {Block}
    assert [set(vars(part)) for part in network.modules()] == attributes
    assert network(images).equal(before)
    detach_reducers(network)  # nothing to do


def test_patched_network_can_be_copied_and_pickled(make_vit, images):
    network = patched(make_vit(distilled=True))
    logits = network(images)
    with record_tokens(network):
        network(images)
        duplicate = copy.deepcopy(network)
    assert duplicate(images).equal(logits)
    assert pickle.loads(pickle.dumps(network))(images).equal(logits)
    detach_reducers(duplicate)
    assert not duplicate(images).equal(logits)
    assert network(images).equal(logits)  # the copy is on its own
    assert network.load_state_dict(duplicate.state_dict(), strict=True)


def test_a_class_of_the_users_own_keeps_its_head(make_vit, images):
    class Doubled(VisionTransformer):
        def forward_head(self, x, pre_logits=False):
            return 2 * super().forward_head(x, pre_logits)

    network = make_vit()
    single = patched(copy.deepcopy(network))(images)
    network.__class__ = Doubled
    close(patched(network)(images), 2 * single)
    detach_reducers(network)
    assert type(network) is Doubled


def test_the_same_settings_twice_are_fine_and_others_are_not(make_vit, images):
    network = patched(make_vit())
    logits = network(images)
    assert patched(network)(images).equal(logits)
    for wrong in (
        lambda: attach_reducers(network, rules(r=3)),
        lambda: attach_reducers(network, rules(), proportional_attention=False),
    ):
        with pytest.raises(ValueError, match="patched already"):
            wrong()


# What it computes


@pytest.mark.parametrize(
    "rule", [PruneOrPool(4, MIXED), MergeSimilar(4), KeepAttentive(0.6), PruneOrPool(4, policy="prune")]
)
@pytest.mark.parametrize("options", [{}, {"distilled": True}, {"reg_tokens": 3, "no_embed_class": True}])
def test_an_image_does_not_depend_on_its_batch(make_vit, images, rule, options):
    network = patched(make_vit(**options), {1: rule, 3: rule})
    logits = network(images)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    close(network(images[order]), logits[order])
    for place in range(len(images)):
        close(network(images[place : place + 1]), logits[place : place + 1])


def test_the_batch_of_these_tests_is_mixed(make_vit, images):
    network = patched(make_vit())
    with record_tokens(network) as records:
        network(images)
    pooled = records.passes[0][1].pooled
    assert 0 < pooled.sum() < len(images)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.5}])
def test_fused_and_plain_attention_agree(make_vit, images, options):
    network = patched(make_vit(**options))
    logits = network(images)
    for block in network.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(network(images), logits, rtol=0, atol=1e-5)


def test_proportional_attention_counts_sizes(make_vit, images):
    network = make_vit()
    with_sizes, without = (
        patched(copy.deepcopy(network), {1: MergeSimilar(6)}, proportional_attention=on)(images)
        for on in (True, False)
    )
    assert not torch.allclose(with_sizes, without, atol=1e-4)
    # a token of size n attends and is attended to as n equal tokens would: duplicate one, and merge it away
    x = torch.randn(2, 17, 48)
    x[:, 2] = x[:, 1]
    state_free = make_vit().blocks[2]
    apart = state_free(x)
    bias = torch.zeros(2, 1, 1, 16)
    bias[..., 1] = torch.tensor(2.0).log()
    together = state_free(torch.cat([x[:, :2], x[:, 3:]], dim=1), attn_mask=bias)
    close(together[:, 2:], apart[:, 3:])


def test_sizes_are_kept_without_proportional_attention(make_vit, images):
    network = patched(make_vit(), {1: MergeSimilar(6), 3: MergeSimilar(3)}, proportional_attention=False)
    with record_tokens(network) as records:
        network(images)
    assert records.passes[0][3].size.sum(dim=1).tolist() == [17] * 6
    assert records.passes[0][3].size.max() > 2


def test_blocks_before_the_first_compression_pay_nothing(make_vit, images):
    network, masks = patched(make_vit(), rules(blocks=(2,))), []
    for block in network.blocks:
        block.register_forward_pre_hook(
            lambda module, inputs, options: masks.append(options.get("attn_mask")), with_kwargs=True
        )
    network(images)
    assert masks[:3] == [None] * 3
    assert all(mask.shape == (6, 1, 1, 13) for mask in masks[3:])


def test_average_pooling_weights_tokens_by_size(make_vit, images):
    network = patched(make_vit(global_pool="avg", fc_norm=False), {1: MergeSimilar(6)})
    with record_tokens(network) as records:
        logits = network(images)
    size, pooled = records.passes[0][1].size[:, 1:, None], []
    network.norm.register_forward_hook(lambda module, inputs, output: pooled.append(output[:, 1:]))
    network.forward_features(images)
    mean = (pooled[0] * size).sum(dim=1) / size.sum(dim=1)
    close(network.head(network.fc_norm(mean)), logits)
    close(network.forward_head(network.forward_features(images)), logits)


def test_register_tokens_stay(make_vit, images):
    network = patched(make_vit(reg_tokens=3), rules(r=99))
    with record_tokens(network, trace=True) as records:
        assert network.forward_features(images).shape[1] == 4 + 4  # 16 patches, 8, 4
    prefix = records.passes[0][3].sources[:, :4, :4]
    assert prefix.equal(torch.eye(4, dtype=torch.uint8).expand(6, -1, -1))


def test_gradients_reach_every_parameter(make_vit, images):
    network = patched(make_vit(distilled=True)).train()
    network(images).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert network.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_sizes_in_float32(make_vit, images, dtype):
    network = patched(make_vit()).to(dtype)
    with torch.no_grad(), record_tokens(network) as records:
        logits = network(images.to(dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert records.passes[0][3].size.dtype == torch.float32


def test_autocast(make_vit, images):
    network = patched(make_vit(), {1: MergeSimilar(4), 3: KeepAttentive(0.6)})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    assert (logits.float() - network(images)).abs().max() < 0.3


def test_recording_starts_and_ends_with_its_context(make_vit, images):
    network = patched(make_vit())
    with record_tokens(network) as records:
        network(images)
        network(images[:2])
    network(images)
    assert [entry[1].tokens for entry in records.passes] == [13, 13]
    assert [len(entry[1].pooled) for entry in records.passes] == [6, 2]
    assert records.passes[0][1].sources is None


# What is refused


def test_masks_and_intermediates_are_refused(make_vit, images):
    network = patched(make_vit())
    for refused in (
        lambda: network(images, attn_mask=torch.zeros(17, 17)),
        lambda: network(images, is_causal=True),
        lambda: network.forward_intermediates(images),
        lambda: network.get_intermediate_layers(images),
        lambda: network.blocks(torch.randn(1, 17, 48)),
    ):
        with pytest.raises(NotImplementedError, match=r"token|blocks\[1\]"):
            refused()


def test_features_only_is_refused(images):
    extractor = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=32)
    attach_reducers(extractor.model, rules())
    with pytest.raises(NotImplementedError, match="features_only"):
        extractor(images)


def test_gradient_checkpointing_is_refused(make_vit, images):
    network = make_vit()
    network.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="checkpointing"):
        attach_reducers(network, rules())
    network.set_grad_checkpointing(False)
    attach_reducers(network, rules())
    network.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="checkpointing"):
        network(images)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"class_token": False, "global_pool": "avg"}, "class token"),
        ({"block_fn": ParallelScalingBlock}, r"blocks\.0: ParallelScalingBlock"),
        ({"global_pool": "map"}, "global_pool='map'"),
        ({"global_pool": "avgmax"}, "global_pool='avgmax'"),
    ],
)
def test_networks_that_do_not_fit_are_refused(options, named):
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **options)
    with pytest.raises(ValueError, match=named):
        attach_reducers(network, rules(blocks=(0,)))
    assert type(network) is VisionTransformer


def test_a_foreign_attention_is_listed(make_vit):
    class Rotary(nn.Module):
        pass

    network = make_vit()
    network.blocks[2].attn = Rotary()
    with pytest.raises(ValueError, match=r"blocks\.2\.attn: Rotary"):
        attach_reducers(network, rules())


@pytest.mark.parametrize("block", [-1, 5])
def test_a_block_outside_of_the_network_is_named(make_vit, block):
    with pytest.raises(ValueError, match=f"compress_blocks: {block}"):
        attach_reducers(make_vit(), rules(blocks=(block,)))


def test_merging_needs_no_class_token(images):
    network = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, class_token=False, global_pool="avg"
    )
    attach_reducers(network.eval(), {0: MergeSimilar(5)})
    with record_tokens(network) as records:
        network(images)
    assert records.passes[0][0].size.sum(dim=1).tolist() == [16] * 6
