"""From a generator's logits to what other networks read, with a gradient: relaxation, mask, embedding."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.dfkd_t3.losses import full
from lightning_modules.parts.options import check_choice, check_range

FORBIDDEN = -1e9
"""Logit of tokens that are never written."""

_OWN = "_made_for_one_reader"


def _own(gradient: Tensor) -> Tensor:
    """Mark a gradient that one node of this file has made for one other: that one may add to it in place."""
    setattr(gradient, _OWN, True)
    return gradient


Kind = Literal["gumbel", "none"]
Estimator = Literal["straight_through", "soft"]
Feedback = Literal["hard", "soft"]
Decoding = Literal["autoregressive", "parallel"]


@dataclass(frozen=True)
class Relaxation:
    """How discrete text becomes something with a gradient (section 2.2).

    Args:
        kind: of the noise: `gumbel` makes the hard tokens samples of the generator, `none` its arg max.
        estimator: `straight_through` has the hard token as its value and the relaxed one's gradient; `soft`
            is the relaxed one.
        tau0: temperature at the start.
        tau1: temperature at the end, geometrically in between; None: constant.
        feedback: what the next step of the decoder reads: the hard token, without gradient, or the relaxed
            one.
        decoding: `autoregressive`, token after token with a key-value cache, or `parallel`, one pass
            teacher-forced on the source.

    Raises:
        OptionError: a temperature is not positive, or a choice is none.
    """

    kind: Kind = "gumbel"
    estimator: Estimator = "straight_through"
    tau0: float = 1.0
    tau1: float | None = None
    feedback: Feedback = "hard"
    decoding: Decoding = "autoregressive"

    def __post_init__(self) -> None:
        check_choice("relaxation.kind", self.kind, Kind)
        check_choice("relaxation.estimator", self.estimator, Estimator)
        check_choice("relaxation.feedback", self.feedback, Feedback)
        check_choice("relaxation.decoding", self.decoding, Decoding)
        check_range("relaxation.tau0", self.tau0, "(0, inf)")
        if self.tau1 is not None:
            check_range("relaxation.tau1", self.tau1, "(0, inf)")

    def tau(self, progress: float) -> float:
        """The temperature at a share of the run in [0, 1]."""
        end = self.tau0 if self.tau1 is None else self.tau1
        return self.tau0 * (end / self.tau0) ** min(max(progress, 0.0), 1.0)

    def relax(self, logits: Tensor, tau: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Relaxed probabilities pi (..., V), with a graph, and hard ids (...) of logits (..., V).

        Args:
            logits: of the generator.
            tau: temperature, positive.
            noise: (..., V), as it is; None draws what `kind` says.
        """
        scores = full(logits)
        if noise is None and self.kind == "gumbel":
            noise = gumbel_noise(scores)
        if noise is not None:
            scores = scores + noise
        del noise  # each is as large as the logits, and the next line makes another one
        ids = scores.detach().argmax(dim=-1)
        return (scores if tau == 1 else scores / tau).softmax(dim=-1), ids


def gumbel_noise(like: Tensor) -> Tensor:
    """-log(-log u) of the shape and type of `like`, u uniform in [1e-9, 1)."""
    noise = torch.rand_like(like).clamp_(1e-9, 1 - 1e-9)
    return noise.log_().neg_().log_().neg_()


class _StraightThrough(torch.autograd.Function):
    """One-hot times embedding as a lookup; the product's gradient with respect to the relaxed tokens.

    Gives the tokens back as a second output: what else reads them reads these, so that the backward pass adds
    the gradients up product by product instead of holding one of the size of the vocabulary for each reader.
    """

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        ctx.dtype = probabilities.dtype
        return weight[ids], probabilities.view_as(probabilities)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        embedded, others = gradients
        if embedded is None:
            return others, None, None
        rows = embedded.to(weight.dtype).flatten(0, -2)
        if others is None:
            gradient = rows @ weight.T
        else:
            added = others.to(weight.dtype).flatten(0, -2)
            if hasattr(others, _OWN) and added.data_ptr() == others.data_ptr():
                gradient = added.addmm_(rows, weight.T)
            else:
                gradient = torch.addmm(added, rows, weight.T)
        return _own(gradient.unflatten(0, embedded.shape[:-1]).to(ctx.dtype)), None, None


class _ValidSum(torch.autograd.Function):
    """sum over the valid positions of pi; its gradient is one outer product, laid out as pi is."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return valid.flatten() @ probabilities.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (valid,) = ctx.saved_tensors
        return _own(valid.unsqueeze(-1) * gradients[0]), None


def sum_of_tokens(probabilities: Tensor, mask: Tensor) -> Tensor:
    """The sum (V,) of pi (B, L, V) over the valid positions of mask (B, L)."""
    return _ValidSum.apply(probabilities, mask.to(probabilities.dtype))


def embed_tokens(
    probabilities: Tensor, ids: Tensor, weight: Tensor, estimator: Estimator = "straight_through"
) -> Tensor:
    """Give v E (..., d): what a network with the embedding E sees of written tokens v.

    With `straight_through` v = h + pi - stopgrad(pi) is one-hot in value, so the forward pass looks rows up
    and neither v nor the product is ever made; the gradient with respect to pi is that of the product. The
    embedding itself gets none.

    Args:
        probabilities: pi (..., V).
        ids: hard tokens (...).
        weight: E (V, d).
        estimator: see `Relaxation`.
    """
    return embed_and_pass(probabilities, ids, weight, estimator)[0]


def embed_and_pass(
    probabilities: Tensor, ids: Tensor, weight: Tensor, estimator: Estimator = "straight_through"
) -> tuple[Tensor, Tensor]:
    """`embed_tokens`, and pi for whoever reads it next: the same values, but less memory backward."""
    weight = weight.detach()
    if estimator == "soft":
        return probabilities.to(weight.dtype) @ weight, probabilities
    embedded, passed = _StraightThrough.apply(probabilities, ids, weight)
    return embedded, passed if torch.is_grad_enabled() else probabilities


def end_mask(ids: Tensor, end: int | None) -> Tensor:
    """Bool (B, L): True up to and including the first end token of ids (B, L); everywhere without one."""
    if end is None:
        return torch.ones_like(ids, dtype=torch.bool)
    ended = (ids == end).long()
    return (ended.cumsum(dim=1) - ended) == 0


@dataclass
class WrittenText:
    """What a generator has written.

    Attributes:
        ids: hard tokens (B, L); `pad` behind the end.
        mask: bool (B, L), True up to and including the end.
        probabilities: pi (B, L, V) with a graph; None where no gradient is wanted.
        logits: of the generator, (B, L, V), before noise; None likewise.
        labels: classes (B,) that the generator was asked for; None where it was not.
    """

    ids: Tensor
    mask: Tensor
    probabilities: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


class SoftTokenBridge:
    """Hands written text to a network as embeddings: its prompt, the tokens, and pads behind the end.

    Args:
        weight: the network's own embedding (V, d).
        prefix: ids of its beginning and prompt, (P,).
        pad: id of its padding.
        scale: that the network's embedding layer multiplies by.
        estimator: see `Relaxation`.
    """

    def __init__(
        self,
        weight: Tensor,
        prefix: Tensor,
        pad: int,
        scale: float = 1.0,
        estimator: Estimator = "straight_through",
    ) -> None:
        self.weight = weight.detach()
        self.prefix = prefix
        self.pad = pad
        self.scale = scale
        self.estimator: Estimator = estimator

    def __call__(self, text: WrittenText) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P + L, d), and the attention mask (B, P + L), int64."""
        if text.probabilities is None:
            embedded = self.weight[text.ids]
        else:
            embedded, text.probabilities = embed_and_pass(
                text.probabilities, text.ids, self.weight, self.estimator
            )
        embedded = torch.where(text.mask.unsqueeze(-1), embedded, self.weight[self.pad])
        prefix = self.weight[self.prefix].expand(len(text), -1, -1)
        ones = text.mask.new_ones(len(text), len(self.prefix))
        whole = torch.cat([prefix, embedded], dim=1)
        return whole if self.scale == 1.0 else whole * self.scale, torch.cat([ones, text.mask], dim=1).long()
