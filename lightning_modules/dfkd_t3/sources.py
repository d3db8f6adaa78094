"""The student's text where no generator writes it: random tokens, and free embeddings (section 2.6)."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.dfkd_t3.bridge import WrittenText
from lightning_modules.dfkd_t3.generator import SpecialTokens
from lightning_modules.dfkd_t3.losses import divergence
from lightning_modules.dfkd_t3.objective import GeneratorObjective

RandomTokens = Literal["uniform", "unigram"]

SHORTEST = 4
"""Tokens of a random text, at least."""


def random_text(
    source: WrittenText, special: SpecialTokens, tokens: RandomTokens = "uniform", size: int | None = None
) -> WrittenText:
    """Independent tokens, as many texts as `source` has, of lengths uniform in 4..L, the end included.

    Args:
        source: a batch of the corpus, of L positions.
        special: of the tokenizer.
        tokens: uniform over what is text, or drawn from the batch's own tokens (its unigram).
        size: number of the network's ids, where the tokenizer has more; None: the tokenizer's.
    """
    count, longest = source.ids.shape
    device = source.ids.device
    size = special.size if size is None else min(size, special.size)
    if tokens == "uniform":
        allowed = torch.tensor([i for i in range(size) if i not in special.special], device=device)
    else:
        valid = source.ids[source.mask]
        allowed = valid[valid != special.end] if special.end is not None else valid
    ids = allowed[torch.randint(len(allowed), (count, longest), device=device)]
    lengths = torch.randint(min(SHORTEST, longest), longest + 1, (count, 1), device=device)
    places = torch.arange(longest, device=device)
    mask = places < lengths
    if special.end is not None:
        ids = torch.where(places == lengths - 1, special.end, ids)
    return WrittenText(ids.masked_fill(~mask, special.pad), mask)


def free_embeddings(
    shape: tuple[int, int, int],
    teacher: Callable[[Tensor], Tensor],
    student: Callable[[Tensor], Tensor],
    num_classes: int,
    objective: GeneratorObjective,
    like: Tensor,
    steps: int = 5,
    rate: float = 1e-2,
    deviation: float = 0.35,
) -> Tensor:
    """AS-DFD: embeddings (B, L, d) that the teacher takes for random classes and the student does not know.

    Args:
        shape: (B, L, d).
        teacher: logits (B, C) of embeddings.
        student: likewise.
        num_classes: C.
        objective: gives the divergence and the adversarial weight.
        like: of the device and type that is wanted.
        steps: of Adam.
        rate: its learning rate.
        deviation: of the normal distribution that they start from.
    """
    embedded = (deviation * torch.randn(shape, device=like.device, dtype=like.dtype)).requires_grad_()
    labels = torch.randint(num_classes, shape[:1], device=like.device)
    optimizer = torch.optim.Adam([embedded], lr=rate)
    for _ in range(steps):
        p, q = teacher(embedded), student(embedded)
        loss = F.cross_entropy(p.float(), labels)
        if objective.weights.adversarial:
            distance = divergence(p, q, objective.divergence, objective.temperature, objective.adv_clip)
            loss = loss - objective.weights.adversarial * distance
        (embedded.grad,) = torch.autograd.grad(loss, embedded)
        optimizer.step()
    return embedded.detach()
