"""What a batch of generated text is like: how sure the teacher is, and how different the texts are."""

from collections import Counter

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_modules.dfkd_t3.bridge import WrittenText
from lightning_modules.dfkd_t3.losses import full, negative_entropy

PATIENCE = 100
REPEATED = 0.9


def distinct(ids: Tensor, mask: Tensor, n: int) -> float:
    """Share of different n-grams among those of ids (B, L), where mask (B, L) holds; 0 without any."""
    if ids.shape[1] < n:
        return 0.0
    grams, valid = ids.unfold(1, n, 1), mask.unfold(1, n, 1).all(dim=-1)
    chosen = grams[valid]
    return len(torch.unique(chosen, dim=0)) / len(chosen) if len(chosen) else 0.0


def describe(text: WrittenText, source: WrittenText, teacher: Tensor) -> dict[str, float | Tensor]:
    """Mean largest probability of the teacher, entropy of its mean classes, tokens that were changed,
    distinct-1 and -2, and mean length.

    Args:
        text: what was written.
        source: what it was made of.
        teacher: its logits (..., C).
    """
    p = full(teacher.detach()).softmax(dim=-1).flatten(0, -2)
    shared = min(text.ids.shape[1], source.ids.shape[1])
    both = text.mask[:, :shared] & source.mask[:, :shared]
    changed = (text.ids[:, :shared] != source.ids[:, :shared])[both]
    return {
        "confidence": p.amax(dim=-1).mean(),
        "class_entropy": -negative_entropy(p.mean(dim=0)),
        "changed": changed.float().mean() if len(changed) else 0.0,
        "distinct_1": distinct(text.ids, text.mask, 1),
        "distinct_2": distinct(text.ids, text.mask, 2),
        "length": text.mask.sum(dim=1).float().mean(),
    }


class CollapseWatch:
    """Warns once when one text is more than 90 % of a batch for 100 steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._said = False

    def see(self, text: WrittenText, weight: float) -> None:
        """Look at a batch.

        Args:
            text: what was written.
            weight: of the token diversity, for the message.
        """
        most = Counter(map(tuple, text.ids.tolist())).most_common(1)[0][1]
        self._steps = self._steps + 1 if len(text) > 1 and most > REPEATED * len(text) else 0
        if self._steps >= PATIENCE and not self._said:
            self._said = True
            rank_zero_warn(
                f"The generator has collapsed: one text is more than {REPEATED:.0%} of each batch "
                f"for {PATIENCE} steps. Raise the diversity weight (objective.weights.token={weight:g}, or "
                "pairwise)."
            )
