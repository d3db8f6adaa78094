"""Closed forms of the terms, and what the bridge is and costs."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.dfkd_t3 import (
    GeneratorObjective,
    Relaxation,
    SoftTokenBridge,
    WrittenText,
    embed_tokens,
)
from lightning_modules.dfkd_t3.bridge import embed_and_pass, end_mask, sum_of_tokens
from lightning_modules.dfkd_t3.losses import (
    divergence,
    negative_entropy,
    onehot_specificity,
    pairwise_cosine,
)


def test_closed_forms():
    uniform, sure = torch.zeros(4, 3), torch.eye(3)[[0, 0, 0, 0]] * 200
    assert onehot_specificity(uniform).item() == pytest.approx(math.log(3))
    assert onehot_specificity(sure).item() == pytest.approx(0)
    assert negative_entropy(uniform.softmax(-1).mean(0)).item() == pytest.approx(-math.log(3))
    assert negative_entropy(sure.softmax(-1).mean(0)).item() == pytest.approx(0, abs=1e-6)
    assert negative_entropy(torch.tensor([0.0, 1.0])).item() == 0
    assert divergence(sure, sure).item() == 0
    far = divergence(sure, sure.roll(1, -1), "js", 2.0).item()
    assert far == pytest.approx(4 * math.log(2), rel=1e-5)
    assert divergence(sure, sure.roll(1, -1), "kl", clip=10.0).item() == 10
    assert pairwise_cosine(torch.eye(3)).item() == 0
    assert pairwise_cosine(torch.ones(3, 5)).item() == pytest.approx(1)
    assert pairwise_cosine(torch.ones(1, 5)).item() == 0


def test_token_diversity_has_a_finite_gradient_where_a_token_is_never_written():
    mu = torch.tensor([0.0, 0.5, 0.5], requires_grad=True)
    negative_entropy(mu).backward()
    assert mu.grad.isfinite().all()


def test_the_value_is_one_hot_and_a_constant_changes_nothing():
    logits, eye = torch.randn(2, 3, 7), torch.eye(7)
    noise = torch.randn(2, 3, 7)
    pi, ids = Relaxation().relax(logits, 0.7, noise)
    assert torch.equal(embed_tokens(pi, ids, eye), eye[ids])
    shifted, same = Relaxation().relax(logits + 5, 0.7, noise)
    assert torch.equal(ids, same)
    torch.testing.assert_close(pi, shifted)
    cold, ids = Relaxation(kind="none").relax(logits, 1e-4)
    torch.testing.assert_close(embed_tokens(cold, ids, eye, "soft"), eye[ids])


def test_the_gradient_is_that_of_the_product():
    logits = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    weight, wanted = torch.randn(9, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    pi, ids = Relaxation(kind="none").relax(logits, 0.5)
    (ours,) = torch.autograd.grad((embed_tokens(pi, ids, weight) * wanted).sum(), logits)
    pi = (logits / 0.5).softmax(-1)
    naive = (torch.nn.functional.one_hot(ids, 9) + pi - pi.detach()) @ weight
    (theirs,) = torch.autograd.grad((naive * wanted).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_text_that_ends_at_once_keeps_that_position():
    assert end_mask(torch.tensor([[1, 5, 1], [3, 1, 2], [3, 4, 5]]), 1).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]


def test_terms_do_not_depend_on_the_order_of_the_batch():
    objective = GeneratorObjective()
    weights = objective.weights.__class__(pairwise=1.0)
    logits, order = torch.randn(5, 4, 9), torch.tensor([3, 0, 4, 1, 2])
    teacher, student, ids = torch.randn(5, 2), torch.randn(5, 2), torch.randint(9, (5, 4))
    mask = torch.rand(5, 4) > 0.3
    mask[:, 0] = True

    def terms(rows):
        text = WrittenText(ids[rows], mask[rows], logits[rows].softmax(-1), logits[rows])
        return objective.terms(weights, teacher[rows], student[rows], text, text)

    first, second = terms(torch.arange(5)), terms(order)
    assert first.keys() == {"specificity", "balance", "adversarial", "token", "pairwise", "content"}
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])


def test_temperature_goes_geometrically():
    relaxation = Relaxation(tau0=1.0, tau1=0.25)
    assert [relaxation.tau(share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0.25])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tau0": 0.0}, "relaxation.tau0=0"), ({"tau1": -1.0}, "tau1"), ({"kind": "laplace"}, "gumbel")],
)
def test_bad_relaxations(options, message):
    with pytest.raises(ValueError, match=message):
        Relaxation(**options)


def test_two_readers_and_the_diversity_add_up_to_the_gradient_of_the_product():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(7, width, dtype=torch.float64) for width in (4, 5)]
    pi, ids = logits.softmax(-1), logits.argmax(-1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    prefix = torch.empty(0, dtype=torch.int64)

    def loss(embedded, tokens):
        return sum(value.sin().sum() for value in embedded) + tokens.square().sum()

    text = WrittenText(ids, mask, pi)
    embedded = [SoftTokenBridge(weight, prefix, 0)(text)[0] for weight in weights]
    (ours,) = torch.autograd.grad(loss(embedded, text.probabilities), logits)
    pi = logits.softmax(-1)
    tokens = torch.nn.functional.one_hot(ids, 7) + pi - pi.detach()
    (theirs,) = torch.autograd.grad(loss([tokens @ weight for weight in weights], pi), logits)
    torch.testing.assert_close(ours, theirs)
    text = WrittenText(ids, mask, logits.softmax(-1))
    with torch.no_grad():  # a reader without a graph does not cut the tokens off
        SoftTokenBridge(weights[0], prefix, 0)(text)
    assert text.probabilities.requires_grad


def test_gradients_of_several_readers_add_up_as_those_of_the_product():
    """Where a gradient may be added to in place, and where something else has it too."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 40, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(40, width, dtype=torch.float64) for width in (5, 7, 6)]
    mask = torch.rand(3, 4) < 0.7

    def loss(pi, embedded, sums):
        kept = [pi * 1.5, pi + pi]  # addition hands one gradient to both sides: nobody may write into it
        return sum(value.sin().sum() for value in [*embedded, *kept, sums])

    def ours(pi, ids):
        embedded = []
        for weight in weights:
            value, pi = embed_and_pass(pi, ids, weight)
            embedded.append(value)
        return loss(pi, embedded, sum_of_tokens(pi, mask))

    def product(pi, ids):
        tokens = F.one_hot(ids, 40).to(pi.dtype) + pi - pi.detach()
        sums = (pi * mask.unsqueeze(-1)).sum((0, 1))
        return loss(pi, [tokens @ weight for weight in weights], sums)

    relaxed = [Relaxation(kind="none").relax(logits, 0.7) for _ in range(2)]
    gradients = [
        torch.autograd.grad(of(*pair), logits)[0] for of, pair in zip((ours, product), relaxed, strict=True)
    ]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


def test_the_bridge_keeps_one_tensor_of_the_vocabularys_size():
    """However many networks read: what the product would keep for each is never made."""
    logits = torch.randn(2, 3, 500, requires_grad=True)
    kept = set()

    def keep(tensor):
        if tensor.numel() == logits.numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pi, ids = Relaxation().relax(logits, 1.0)
        for width in (4, 5, 7):
            _, pi = embed_and_pass(pi, ids, torch.randn(500, width))
        sum_of_tokens(pi, torch.ones(2, 3, dtype=torch.bool))
    assert len(kept) == 1
