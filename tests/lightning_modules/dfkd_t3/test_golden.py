"""The spec's golden numbers: relaxation and its gradient, mask, every term, metrics."""

import json
from pathlib import Path

import pytest
import torch

from lightning_modules.dfkd_t3.bridge import Relaxation, embed_tokens, end_mask
from lightning_modules.dfkd_t3.losses import (
    anchor_loss,
    bags,
    content_loss,
    divergence,
    label_specificity,
    mean_class_entropy,
    negative_entropy,
    onehot_specificity,
    pairwise_cosine,
    token_divergence,
)
from lightning_modules.dfkd_t3.objective import GeneratorObjective
from lightning_modules.parts.text_metrics import (
    MatthewsCorrelation,
    entity_spans,
    matthews,
    precision_recall_f1,
)
from lightning_modules.parts.text_networks import verbalised
from tests.golden.fill import inputs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dfkd_t3.json").read_text())
LOSSES = [name for name in GOLDEN if name.startswith("losses")]


def close(found, wanted):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).flatten(),
        torch.as_tensor(wanted, dtype=torch.float64).flatten(),
        atol=1e-9,
        rtol=1e-6,
    )


class Group:
    """The inputs of a golden group."""

    def __init__(self, name):
        self.golden = golden = GOLDEN[name]
        self.B, self.L, self.V, self.C = (golden[key] for key in "BLVC")
        self.tau, self.T = golden["tau"], golden["T"]
        self.logits = 2 * self("logits", self.B, self.L, self.V)
        self.noise = self("noise", self.B, self.L, self.V)
        self.pi, ids = Relaxation().relax(self.logits, self.tau, self.noise)
        self.ids = ids.clone()
        self.ids[0, min(2, self.L - 1)] = golden["eos"]
        self.mask = end_mask(self.ids, golden["eos"])
        self.teacher, self.student = 2 * self("teacher", self.B, self.C), 2 * self("student", self.B, self.C)

    def __call__(self, name, *shape):
        return inputs(f"{self.golden['tag']}/{name}", shape).double()


@pytest.fixture(params=LOSSES)
def group(request):
    return Group(request.param)


def test_relaxation_and_mask(group):
    golden = group.golden
    close(group.pi.flatten()[:4], golden["pi_first4"])
    assert group.ids.tolist() == golden["hard_ids"]
    assert group.mask.int().tolist() == golden["mask"]
    weight = group("E", group.V, 5)
    close(embed_tokens(group.pi, group.ids, weight, "soft").abs().sum(), golden["soft_embed_abs_sum"])
    close(embed_tokens(group.pi, group.ids, weight).abs().sum(), golden["hard_embed_abs_sum"])


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_gradient_of_the_relaxation(group, estimator):
    """sum(C v) with v E for E = 1 is sum over the embedding's columns: E = identity gives v itself."""
    logits = group.logits.clone().requires_grad_()
    pi, ids = Relaxation().relax(logits, group.tau, group.noise)
    v = embed_tokens(pi, ids, torch.eye(group.V, dtype=torch.float64), estimator)
    (gradient,) = torch.autograd.grad((group("C", group.B, group.L, group.V) * v).sum(), logits)
    close(gradient.flatten()[:4], group.golden["relax_grad_first4"])
    close(gradient.abs().sum(), group.golden["relax_grad_abs_sum"])
    assert gradient.sum(dim=-1).abs().max() < 1e-12


def test_terms(group):
    golden, T = group.golden, group.T
    teacher, student = group.teacher, group.student
    spec, balance = onehot_specificity(teacher), negative_entropy(teacher.softmax(-1).mean(0))
    close(spec, golden["spec_onehot"])
    close(label_specificity(teacher, torch.tensor(golden["labels"])), golden["spec_label"])
    close(balance, golden["balance"])
    close(mean_class_entropy(teacher), golden["entropy_mean"])
    for kind, name in (("kl", "kd_forward_kl"), ("reverse_kl", "kd_reverse_kl"), ("js", "js"), ("l1", "l1")):
        close(divergence(teacher, student, kind, T), golden[name])
    token = negative_entropy(GeneratorObjective().mean_tokens(group.pi, group.mask))
    close(token, golden["token_negentropy"])
    close(pairwise_cosine(bags(group.pi, group.mask)), golden["pairwise_cos"])
    rows, columns = torch.arange(group.B)[:, None], torch.arange(group.L)[None]
    source = (3 * rows + 5 * columns + 2) % group.V
    content = content_loss(group.logits, source, columns < group.L - rows % 2)
    close(content, golden["content_ce"])
    reference = 2 * group("ref", group.B, group.L, group.V)
    close(anchor_loss(group.logits, reference, group.mask), golden["anchor_kl"])
    tokens = [2 * group(name, group.B, group.L, group.C) for name in ("t_tok", "s_tok")]
    close(token_divergence(*tokens, group.mask, T), golden["token_kd"])
    weights = golden["lambda"]
    total = weights["spec"] * spec + weights["balance"] * balance
    total += weights["adv"] * -divergence(teacher, student, "kl", T)
    total += weights["token"] * token + weights["content"] * content
    close(total, golden["generator_total"])


def test_verbaliser(group):
    logits = 2 * group("vocab_logits", group.B, group.V)
    found = verbalised(logits, torch.tensor(group.golden["label_token_ids"])).softmax(-1)[0]
    close(found, group.golden["verbalised_first_row"])


@pytest.mark.parametrize("case", GOLDEN["mcc"])
def test_matthews(case):
    metric = MatthewsCorrelation()
    metric.update(torch.tensor(case["p"]), torch.tensor(case["y"]))
    close(matthews(metric.confusion), case["value"])
    assert float(metric.compute()) == pytest.approx(case["value"], abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN["entity_f1"])
def test_entities(case):
    pairs = [(entity_spans(g), entity_spans(p)) for g, p in zip(case["gold"], case["pred"], strict=True)]
    correct = sum(len(g & p) for g, p in pairs)
    gold, predicted = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    assert (correct, predicted, gold) == (case["correct"], case["n_pred"], case["n_gold"])
    close(precision_recall_f1(correct, predicted, gold), [case["precision"], case["recall"], case["f1"]])
