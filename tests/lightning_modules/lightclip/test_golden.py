"""The spec's golden numbers: schedule, losses, gradients, matching, masking, forward passes, sizes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.lightclip.evaluation import class_weights
from lightning_modules.lightclip.losses import Softening, instance_loss, soft_targets, token_loss
from lightning_modules.lightclip.matching import Matching, token_scores
from lightning_modules.lightclip.network import FusionBlocks, LightCLIPNet, injection_points
from lightning_modules.lightclip.words import end_positions, mask_tokens, word_mask
from lightning_modules.parts.retrieval import ranking_scores, summary
from tests.golden.fill import fill, inputs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lightclip.json").read_text())


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).detach().flatten(),
        torch.as_tensor(wanted, dtype=torch.float64).flatten(),
        atol=tolerance,
        rtol=tolerance,
    )


def assert_statistics(tensor, wanted):
    assert list(tensor.shape) == wanted["shape"]
    values = tensor.detach().double().flatten()
    for found, name in ((values.mean(), "mean"), (values.std(unbiased=False), "std"), (values[:8], "first8")):
        close(found, wanted[name], 1e-3)
    close(values.abs().sum(), wanted["abs_sum"], 1e-3)
    for place, value in wanted["at"].items():
        close(values[int(place)], value, 1e-3)


def features(case):
    shape = case["N"], case["D"]
    return [inputs(f"{case['label']}.{side}", shape).double().requires_grad_() for side in "vt"]


def softened(case):
    return case["scale"], case["alpha"], case["mode"], case.get("softening_temperature")


@pytest.mark.parametrize("case", GOLDEN["alpha_schedule"])
def test_schedule(case):
    softening = Softening(
        kind=case["kind"],
        start=case["alpha_start"],
        end=case["alpha_end"],
        hold=case["hold"],
        stages=case["stages"],
    )
    epochs = case["epochs"]
    close([softening.alpha(e / max(epochs - 1, 1)) for e in range(epochs)], case["values"])


@pytest.mark.parametrize("case", GOLDEN["instance_loss"])
def test_instance_loss(case):
    i2t, t2i = instance_loss(*features(case), *softened(case))
    close([i2t, t2i, (i2t + t2i) / 2], [case["i2t"], case["t2i"], case["loss"]])


def test_targets_gradients_and_ranks():
    case = GOLDEN["soft_targets_i2t"]
    v, t = (F.normalize(x, dim=-1) for x in features(case))
    scale, alpha, mode, temperature = softened(case)
    targets = soft_targets(v @ t.T, torch.arange(case["N"]), scale, alpha, mode, temperature)
    close(targets, case["matrix"])
    assert not targets.requires_grad
    case = GOLDEN["instance_grad"]
    v, t = features(case)
    dv, dt = torch.autograd.grad(sum(instance_loss(v, t, *softened(case))) / 2, (v, t))
    close([dv.abs().sum(), dt.abs().sum()], [case["dv_abs_sum"], case["dt_abs_sum"]])
    close(dv.flatten()[:4], case["dv_first4"])
    close(dt.flatten()[:4], case["dt_first4"])
    case = GOLDEN["instance_loss_two_ranks"]
    v, t = features(case)
    half = case["local_batch"]
    ranks = [
        sum(instance_loss(v[at : at + half], t[at : at + half], *softened(case), v, t, at)) / 2
        for at in (0, half)
    ]
    close([*ranks, sum(ranks) / 2], [case["rank0"], case["rank1"], case["mean"]])


def test_closed_forms():
    for case in GOLDEN["closed_form_instance"]:
        same = torch.eye(case["N"], dtype=torch.float64)
        for mode in ("similarity", "uniform"):
            loss = sum(instance_loss(same, same, case["scale"], case["alpha"], mode)) / 2
            close(loss, case["loss"])


def tokens(case):
    n, d = case["N"], case["D"]
    patches = inputs(case["label"] + ".p", (n, case["P"], d)).double().requires_grad_()
    words = inputs(case["label"] + ".w", (n, case["W"], d)).double().requires_grad_()
    valid = torch.arange(case["W"]) < torch.tensor(case["lengths"])[:, None]
    return patches, words, valid


@pytest.mark.parametrize("case", GOLDEN["token"], ids=lambda c: f"{c['label']}-{c['mode']}-{c['capacity']}")
def test_token(case):
    patches, words, valid = tokens(case)
    matching = Matching(case["mode"], case["capacity"])
    scores = token_scores(F.normalize(patches, dim=-1), F.normalize(words, dim=-1), valid, matching)
    kept = valid.any(1)
    wanted = [[x for x in row if x is not None] for row in case["score"]]
    close(scores[1][:, kept], wanted)
    if "patch_score" in case:
        close(scores[0][:, kept], [[x for x in row if x is not None] for row in case["patch_score"]])
    close(token_loss(*scores, valid.sum(1), case["scale"]), case["loss"])


@pytest.mark.parametrize("case", GOLDEN["token_grad"], ids=lambda c: c["label"])
def test_token_gradients(case):
    like = next(t for t in GOLDEN["token"] if t["label"] == case["label"])
    patches, words, valid = tokens(like)
    scores = token_scores(F.normalize(patches, dim=-1), F.normalize(words, dim=-1), valid)
    da, db = torch.autograd.grad(token_loss(*scores, valid.sum(1), like["scale"]), (patches, words))
    close([da.abs().sum(), db.abs().sum()], [case["da_abs_sum"], case["db_abs_sum"]])
    close(da.flatten()[:4], case["da_first4"])


def test_masking():
    for case in GOLDEN["mask_tokens"]:
        ids = torch.tensor(case["ids"])
        words = word_mask(ids, end_positions(ids, case["eot"]))
        found = mask_tokens(
            ids,
            words,
            torch.tensor(case["u_select"]),
            torch.tensor(case["u_kind"]),
            torch.tensor(case["random_ids"]),
            case["mask_id"],
            case["p"],
            case["ensure_one"],
        )
        assert [part.tolist() for part in found] == [case["masked"], case["labels"]]


def test_words_of_the_tokenizer():
    from open_clip import tokenize

    for case in GOLDEN["word_mask"]:
        ids = tokenize([case["caption"]], context_length=case["context_length"])
        ends = end_positions(ids, 49407)
        assert ids.tolist() == [case["ids"]]
        assert (int(ends), int(word_mask(ids, ends).sum())) == (case["eot_position"], case["words"])


def test_injection_points():
    for case in GOLDEN["injection_points"]:
        assert injection_points(case["layers"], case["stages"]) == case["points"]


def test_fusion_block():
    for case in GOLDEN["fusion_block"]:
        width = case["width"]
        block = fill(FusionBlocks([8], width, case["heads"], "stages").blocks[0]).eval()
        assert sum(p.numel() for p in block.parameters()) == case["parameters"]
        x = inputs(case["label"] + ".x", (case["batch"], case["queries"], width))
        kv = block.ln_1_kv(inputs(case["label"] + ".kv", (case["batch"], case["keys"], width)))
        x = x + block.attn(block.ln_1(x), kv, kv)[0]
        assert_statistics(x + block.mlp(block.ln_2(x)), case["output"])


def test_network():
    case = GOLDEN["network"][0]
    c, size = case["config"], case["image_size"]
    net = LightCLIPNet(
        case["trunk"], size, c["D"], c["W"], c["heads"], c["layers"], c["ctx"], c["V"], c["sot"], c["eot"],
        align_width=c["dtok"],
    )  # fmt: skip
    net = fill(net).eval()
    assert sum(p.numel() for p in net.parameters()) == case["parameters"]
    images = inputs(case["label"] + ".img", (case["batch"], 3, size, size))
    ids, masked = torch.tensor(case["token_ids"]), torch.tensor(case["masked_ids"])
    labels = torch.tensor(case["labels"])
    with torch.no_grad():
        maps = net.visual.maps(images)
        assert [list(m.shape) for m in maps] == case["stage_shapes"]
        v, t = net.visual.project(maps[-1]), net.encode_text(ids)
        hidden = net.text_hidden(ids)
        fused = net.text_hidden(masked, maps)
        logits = net.word_logits(fused[labels != -100])
        for found, name in (
            (v, "image_features"),
            (t, "text_features"),
            (hidden, "text_hidden"),
            (fused, "fused_hidden"),
            (logits, "mlm_logits"),
        ):
            assert_statistics(found, case[name])
        instance = sum(instance_loss(v, t, net.logit_scale.exp(), 0.1)) / 2
        words = word_mask(ids, end_positions(ids, c["eot"]))
        scores = token_scores(net.token_align.patches(maps[-1]), net.token_align.words(hidden), words)
        token = token_loss(*scores, words.sum(1), net.token_align.logit_scale.exp())
        mlm = F.cross_entropy(logits, labels[labels != -100])
    close(
        [instance, token, mlm],
        [case[k] for k in ("instance_loss_alpha_0_1", "token_loss_relaxed", "mlm_loss")],
        1e-3,
    )
    close(instance + token + 0.5 * mlm, case["total_1_1_half"], 1e-3)


@pytest.mark.parametrize(("name", "trunk"), [("resnet18", "resnet18"), ("mobilenetv2", "mobilenetv2_100")])
def test_sizes(name, trunk):
    wanted = GOLDEN["parameter_counts"][name]
    net = LightCLIPNet(trunk)
    count = {key: value.numel() for key, value in net.named_parameters()}

    def total(*prefixes):
        return sum(size for key, size in count.items() if key.startswith(prefixes))

    assert total("visual.trunk") == wanted["visual_trunk"]
    assert total("visual.head") == wanted["visual_head"]
    assert total("token_align.") == wanted["token_align"]
    assert total("fusion.blocks") == wanted["fusion_blocks"]
    assert total("fusion.image_proj") == wanted["fusion_image_proj"]
    assert total("mlm.") == wanted["mlm"]
    assert sum(count.values()) == wanted["training"]
    assert sum(count.values()) - total("token_align.", "fusion.", "mlm.") == wanted["inference"]


def test_retrieval():
    for case in GOLDEN["retrieval"]:
        images, captions = case["images"], case["captions"]
        owner = torch.arange(captions) // 5
        similarity = inputs(case["label"], (images, captions)).double()
        similarity += case["bonus"] * (owner == torch.arange(images)[:, None])
        ways = {
            "i2t": (similarity, torch.arange(images), owner),
            "t2i": (similarity.T, owner, torch.arange(images)),
        }
        for way, (scores, asked, there) in ways.items():
            ranked = ranking_scores(scores, asked, torch.eye(scores.shape[1]).double(), there)
            found = summary(ranked)
            close([found[f"R{k}"] for k in (1, 5, 10)], [case[f"{way}_R@{k}"] for k in (1, 5, 10)])


def test_zero_shot_ensemble():
    case = GOLDEN["zeroshot_ensemble"]
    texts = inputs(case["label"] + ".text", (case["classes"], case["templates"], case["D"])).double()
    images = F.normalize(inputs(case["label"] + ".img", (case["images"], case["D"])).double(), dim=-1)
    weights = class_weights(texts)
    close(weights.flatten()[:4], case["class_weight_first4"])
    top, predicted = (images @ weights.T).max(1)
    assert predicted.tolist() == case["pred"]
    close(top, case["top_cos"])
