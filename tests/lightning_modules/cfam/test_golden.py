"""The spec's golden numbers: metrics, losses, mined pairs, modules, positions, schedule, whole models."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from datamodules.person_retrieval import CaptionTokenizer
from lightning_modules.cfam import CFAM, GranularityDecoder, IdentityHead, Matcher
from lightning_modules.cfam.losses import cosine, hard_negatives, itc, local_similarity, sdm
from lightning_modules.cfam.objective import LossSettings
from lightning_modules.cfam.positions import resize_grid, resize_length
from lightning_modules.cfam.schedule import rate_factor
from lightning_modules.parts.retrieval import ranking_scores, summary
from tests.golden.fill import fill, inputs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "cfam.json").read_text())


def close(value, expected, tolerance=1e-4):
    value = torch.as_tensor(value).detach().double()
    torch.testing.assert_close(value, torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


def assert_stats(tensor, golden):
    flat = tensor.detach().double().flatten()
    close(flat.mean(), golden["mean"])
    close(flat.std(correction=0), golden["std"])
    torch.testing.assert_close(flat.abs().sum(), torch.tensor(golden["abs_sum"]).double(), rtol=1e-4, atol=0)
    close(flat[:8], golden["first8"])
    places = [k * (len(flat) - 1) // 7 for k in range(8)]
    assert places == golden["at_idx"]
    close(flat[places], golden["at"])


def config(clip):
    return {
        "embed_dim": clip["embed_dim"],
        "vision_cfg": {
            "layers": clip["vision_layers"],
            "width": clip["vision_width"],
            "head_width": 64,
            "patch_size": clip["patch"],
        },
        "text_cfg": {
            "vocab_size": clip["vocab_size"],
            "width": clip["text_width"],
            "heads": clip["text_width"] // 64,
            "layers": clip["text_layers"],
        },
    }


@pytest.mark.parametrize("case", GOLDEN["metrics"], ids=lambda case: case["tag"])
def test_metrics(case):
    tag, dim = case["tag"], case["D"]
    centers = inputs(tag + "/centers", (case["P"], dim))
    q_ids, g_ids = torch.tensor(case["q_pids"]), torch.tensor(case["g_pids"])
    queries = F.normalize(centers[q_ids] + case["sigma"] * inputs(tag + "/q", (case["Q"], dim)), dim=1)
    gallery = F.normalize(centers[g_ids] + case["sigma"] * inputs(tag + "/g", (case["G"], dim)), dim=1)
    scores = ranking_scores(queries, q_ids, gallery, g_ids, released=True)
    close(scores["SD"], case["SD_per_query"], 1e-5)
    found = summary(scores)
    for name in ("R1", "R5", "R10", "mAP", "mINP", "mSD"):
        close(found[name], case[name], 1e-5)
    close(found["mSD_released"], case["mSD_as_released"], 1e-5)


@pytest.mark.parametrize("kind", ["raw", "normalized"])
@pytest.mark.parametrize("case", GOLDEN["toy_rank_lists"])
def test_rank_lists(case, kind):
    gallery = torch.tensor(case["similarities"], dtype=torch.float64)[:, None]
    ids = torch.tensor(case["relevant"])
    query = torch.ones(1, 1, dtype=torch.float64)
    scores = ranking_scores(query, torch.tensor([1]), gallery, ids, normalize=kind == "normalized")
    for name, value in case[kind].items():
        close(scores[name][0], value, 1e-7)


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: case["tag"])
def test_losses(case):
    tag, batch, dim = case["tag"], case["B"], case["D"]
    v, t = inputs(tag + "/v", (batch, dim)), inputs(tag + "/t", (batch, dim))
    fv, ft = (inputs(f"{tag}/F{side}", (batch, case["K"], dim)) for side in "vt")
    pids = torch.tensor(case["pids"])
    same, tau = pids[:, None] == pids, 1 / case["logit_scale"]
    by_image, by_text = cosine(v, t), cosine(t, v)
    close(sdm(by_image, same, tau) + sdm(by_text, same, tau), case["sdm"], 1e-5)
    rows = torch.arange(batch)
    close((itc(by_image, rows, tau) + itc(by_text, rows, tau)) / 2, case["itc"], 1e-5)
    logits = [inputs(f"{tag}/logits_{side}", (batch, case["num_classes"])) for side in "vt"]
    close(sum(F.cross_entropy(each, pids) for each in logits) / 2, case["id"], 1e-5)
    local = local_similarity(fv, ft)
    close(local[0, 0], case["local_sim_00"], 1e-5)
    close(local[0, 1], case["local_sim_01"], 1e-5)
    close(local.sum(), case["local_sim_sum"], 1e-5)
    close(sdm(local, same, tau) + sdm(local.T, same, tau), case["sdm_local"], 1e-5)
    text, _ = hard_negatives(by_image, same)
    image, _ = hard_negatives(by_text, same)
    assert text.tolist() == case["hard_text_for_image"]
    assert image.tolist() == case["hard_image_for_text"]
    head = fill(IdentityHead(dim, case["num_classes"]))
    vs, ts = torch.cat([v, v, v[image]]), torch.cat([t, t[text], t])
    target = torch.cat([pids, torch.full((2 * batch,), case["num_classes"])])
    close(
        (F.cross_entropy(head(vs, ts), target) + F.cross_entropy(head(ts, vs), target)) / 2, case["cid"], 1e-5
    )


@pytest.mark.parametrize("case", GOLDEN["modules"], ids=lambda case: case["tag"])
def test_modules(case):
    tag, dim, batch = case["tag"], case["dim"], case["B"]
    decoder = fill(GranularityDecoder(dim, case["num_queries"], case["decoder_depth"])).eval()
    matcher = fill(Matcher(dim, case["matcher_depth"])).eval()
    assert sum(p.numel() for p in decoder.parameters()) == case["params"]["decoder"]
    assert sum(p.numel() for p in matcher.parameters()) == case["params"]["matcher"]
    visual = inputs(tag + "/visual_tokens", (batch, case["Lv"], dim))
    text = inputs(tag + "/text_tokens", (batch, case["Lt"], dim))
    ignore = torch.arange(case["Lt"]) >= torch.tensor(case["valid_text_lengths"])[:, None]
    with torch.no_grad():
        fv, ft = decoder(visual), decoder(text, ignore)
        assert_stats(fv, case["Fv"])
        assert_stats(ft, case["Ft"])
        assert_stats(decoder(text), case["Ft_unmasked"])
        close(matcher(fv, ft), case["match_logits"])


@pytest.mark.parametrize("case", GOLDEN["pos_embed"], ids=lambda case: case["tag"])
def test_positions(case):
    table = inputs(case["tag"] + "/visual", (case["old_grid"] ** 2 + 1, case["dim"]))
    assert_stats(resize_grid(table, tuple(case["new_grid"])), case["visual"])
    text = inputs(case["tag"] + "/text", (case["old_len"], case["dim"]))
    longer = resize_length(text, case["new_len"])
    assert_stats(longer, case["text"])
    torch.testing.assert_close(longer[[0, -1]], text[[0, -1]])


@pytest.mark.parametrize("case", GOLDEN["lr"])
def test_schedule(case):
    for epoch, rate in case["lr"].items():
        options = case["total_epochs"], case["warmup_epochs"], case["warmup_factor"]
        assert math.isclose(case["base_lr"] * rate_factor(int(epoch), *options), rate, rel_tol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["end_to_end"], ids=lambda case: case["tag"])
def test_end_to_end(case):
    clip, batch = case["clip"], case["B"]
    model = CFAM(
        model=config(clip),
        pretrained=None,
        image_size=tuple(clip["image_size"]),
        context_length=clip["context_length"],
        stride=clip["stride"],
        num_classes=case["num_classes"],
        num_queries=case["num_queries"],
        decoder_depth=case["decoder_depth"],
        matcher_depth=case["matcher_depth"],
        settings=LossSettings(temperature=case["temperature"]),
    ).eval()
    for part in (model.base_model, model.granularity_decoder, model.matcher, model.cid_head):
        fill(part)
    images = inputs(case["tag"] + "/images", (batch, 3, *clip["image_size"]))
    ids = torch.zeros(batch, clip["context_length"], dtype=torch.int64)
    for b in range(batch):
        length = clip["context_length"] - 2 * b
        ids[b, 0], ids[b, length - 1] = case["sot"], case["eot"]
        for p in range(1, length - 1):
            ids[b, p] = (37 * b + 11 * p) % (case["sot"] - 10) + 1
    found = model._sides(images, ids)
    assert_stats(found["v"], case["v"])
    assert_stats(found["t"], case["t"])
    assert_stats(model.base_model.image_tokens(images), case["visual_tokens"])
    assert_stats(model.base_model.text_tokens(ids), case["text_tokens"])
    close(cosine(found["v"], found["t"]), case["global_similarity"])
    close(local_similarity(found["fv"], found["ft"]), case["local_similarity"])
    terms = model.losses(found, {"identity": torch.tensor(case["pids"])})
    for name, value in terms.items():
        close(value, case["losses"][name], 1e-5)
    total = sum(terms.values())
    close(total, case["losses"]["total"], 1e-5)
    total.backward()
    for name, norm in case["grad_norm"].items():
        torch.testing.assert_close(
            model.get_parameter(name).grad.norm(), torch.tensor(norm), rtol=1e-4, atol=0
        )
    model._score = "fused"
    with torch.no_grad():
        fused = model.encode_image(images) @ model.encode_text(ids).T
    close(fused.sum(), case["fused_similarity_alpha_0p8_sum"])


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: case["context_length"])
def test_tokens(case):
    ids, _ = CaptionTokenizer(case["context_length"])([case["text"]])
    assert ids[0, : len(case["ids"])].tolist() == case["ids"]
    assert not ids[0, len(case["ids"]) :].any()
