"""The golden numbers, made with the authors' code and checked in float64."""

from functools import partial

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from callbacks.token_reduction import PruneOrPool, VitShape, attach_reducers, record_tokens
from callbacks.token_reduction.merge import merge, merge_sources
from callbacks.token_reduction.network import CompressingBlock
from callbacks.token_reduction.pairing import Plan, pair_tokens, prune, removable
from callbacks.token_reduction.score import dispersion, significance
from callbacks.token_reduction.state import TokenState

close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def check_sample(tensor, block):
    flat = tensor.double().flatten()
    assert list(tensor.shape) == block["shape"]
    close(flat[:8], torch.tensor(block["first8"], dtype=torch.float64))
    close(flat[block["idx"]], torch.tensor(block["at_idx"], dtype=torch.float64))
    assert flat.mean().item() == pytest.approx(block["mean"], abs=1e-5)
    assert flat.std(correction=0).item() == pytest.approx(block["std"], rel=1e-5)
    assert flat.abs().sum().item() == pytest.approx(block["abs_sum"], rel=1e-5)


def sizes_of(filling, case):
    return (1 + (2 * filling.inputs(case["tag"] + ".size", (case["B"], case["tokens"], 1)).abs()).round())[
        ..., 0
    ]


def test_score(golden, filling):
    for case in golden["score"]:
        shape = (case["B"], case["heads"], case["tokens"], case["tokens"])
        attention = filling.inputs(case["tag"] + ".logits", shape).softmax(dim=-1)
        values = filling.inputs(case["tag"] + ".v", (*shape[:3], case["head_dim"]))
        scores = significance(attention[:, :, 0].sum(dim=1), values, prefix=1)
        torch.testing.assert_close(scores, torch.tensor(case["scores"]), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(dispersion(scores), torch.tensor(case["variance"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("index", range(3))
def test_match(golden, filling, index):
    case = golden["match"][index]
    tag, prefix, tokens = case["tag"], case["prefix"], case["tokens"]
    metric = filling.inputs(tag + ".metric", (case["B"], tokens, case["metric_dim"]))
    x = filling.inputs(tag + ".x", (case["B"], tokens, case["channels"]))
    plan = pair_tokens(metric, removable(tokens, prefix, case["r"]), prefix)
    out, size = merge(x, sizes_of(filling, case), plan)
    check_sample(out, case["out"])
    close(out.mean(dim=-1), torch.tensor(case["token_mean"]))
    assert size.tolist() == case["size"]
    sources = merge_sources(torch.eye(tokens, dtype=torch.uint8).expand(case["B"], -1, -1), plan)
    groups = [[row.nonzero().flatten().tolist() for row in image] for image in sources]
    assert groups == case["groups"]


def test_prune(golden, filling):
    for case in golden["prune"]:
        scores = filling.inputs(case["tag"] + ".scores", (case["B"], case["tokens"] - 1)).abs()
        x = filling.inputs(case["tag"] + ".x", (case["B"], case["tokens"], case["channels"]))
        kept = prune(scores / scores.sum(dim=1, keepdim=True), case["tokens"] - 1 - case["r"], prefix=1)
        assert kept.tolist() == case["kept"]
        out, _ = merge(x, torch.ones(x.shape[:2]), Plan(kept))
        close(out.mean(dim=-1), torch.tensor(case["token_mean"]))


@pytest.mark.parametrize("dispatch", ["both", "split"])
@pytest.mark.parametrize("index", range(4))
def test_block(golden, filling, index, dispatch):
    case = golden["block"][index]
    norm = partial(nn.LayerNorm, eps=1e-6)
    block = Block(case["dim"], case["heads"], case["mlp_ratio"], qkv_bias=True, norm_layer=norm)
    block = filling.fill(block).eval()
    block.__class__ = CompressingBlock
    block.block_index, block.token_reducer = 0, PruneOrPool(case["r"], case["threshold"], dispatch=dispatch)
    x = filling.inputs(case["tag"] + ".x", (case["B"], case["tokens"], case["dim"]))
    state = TokenState(prefix=1, record=True)
    if case["input_size_given"]:
        state.resize(sizes_of(filling, case), x)
    with torch.no_grad():
        out = block(x, state=state)
    record = state.records[0]
    torch.testing.assert_close(record.variance, torch.tensor(case["variance"]), rtol=1e-5, atol=1e-8)
    assert record.pooled.int().tolist() == case["pooled"]
    check_sample(out, case["out"])
    close(out.mean(dim=-1), torch.tensor(case["token_mean"]))
    assert state.sizes(out).tolist() == case["size"]


def network_of(model, filling):
    if isinstance(model, str):
        return filling.fill(timm.create_model(model)).eval()
    kind = VisionTransformerDistilled if model.get("distilled") else VisionTransformer
    network = kind(
        img_size=model["img"],
        patch_size=model["patch"],
        embed_dim=model["dim"],
        depth=model["depth"],
        num_heads=model["heads"],
        mlp_ratio=model["mlp_ratio"],
        num_classes=model["classes"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return filling.fill(network).eval()


CASES = [("tiny_vit", i) for i in range(4)] + [("distilled", 0)] + [("deit_tiny", i) for i in range(3)]


@pytest.mark.parametrize(("group", "index"), CASES)
def test_network(golden, filling, group, index):
    case = golden[group][index]
    network = network_of(case["model"], filling)
    rules = {block: PruneOrPool(case["r"], case["threshold"]) for block in case["compress_blocks"]}
    attach_reducers(network, rules, case["proportional_attention"])
    with torch.inference_mode(), record_tokens(network) as records:
        logits = network(filling.inputs(case["input_label"], tuple(case["input_shape"])))
    (record,) = records.passes
    tokens_in = case["blocks"][0]["tokens_in"]
    for expected in case["blocks"]:
        seen = record[expected["block"]]
        assert tokens_in == expected["tokens_in"]
        assert tokens_in - seen.tokens == expected["r"]
        assert seen.pooled.int().tolist() == expected["pooled"]
        if "variance" in expected:
            torch.testing.assert_close(seen.variance, torch.tensor(expected["variance"]), rtol=1e-4, atol=0)
        tokens_in = seen.tokens
    assert tokens_in == case["final_tokens"]
    size = record[case["compress_blocks"][-1]].size
    # no sizes are kept while nothing has been merged: every token that is left is one patch
    total = [float(tokens_in)] * len(logits) if size is None else size.sum(dim=1).tolist()
    assert total == case["final_size_sum"]
    if isinstance(case["logits"], dict):
        check_sample(logits, case["logits"])
    else:
        close(logits, torch.tensor(case["logits"]))


def test_macs(golden):
    for case in golden["macs"]:
        dim = case["dim"]
        shape = VitShape(197, dim, case["depth"], mlp_macs=8 * dim**2, outside=196 * 768 * dim + 1000 * dim)
        rules = {block: PruneOrPool(case["r"]) for block in case["compress_blocks"]}
        assert shape.macs(rules) == case["macs"]
        assert shape.tokens_after_blocks(rules) == case["tokens_after_block"]
