"""Which positions of token ids are words, and which of them are masked (section 2.5)."""

import torch
from torch import Tensor

from lightning_modules.parts.options import OptionError

IGNORED = -100


def end_positions(ids: Tensor, end: int) -> Tensor:
    """Position (batch,) of the first end token of each row of `ids` (batch, length).

    Raises:
        OptionError: a row has none.
    """
    found = ids == end
    if not torch.compiler.is_compiling() and not bool(found.any(1).all()):
        raise OptionError(
            f"a caption's ids have no end token {end}: they are of another tokenizer than the model's."
        )
    return found.int().argmax(1)


def word_mask(ids: Tensor, ends: Tensor) -> Tensor:
    """Whether a position is strictly between start and end, (batch, length).

    Never by `id != 0`: 0 is the byte pair "!" as well as the padding.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    return (place > 0) & (place < ends.unsqueeze(1))


def mask_tokens(
    ids: Tensor,
    words: Tensor,
    select: Tensor,
    kind: Tensor,
    random_ids: Tensor,
    mask_id: int,
    probability: float = 0.15,
    ensure_one: bool = True,
) -> tuple[Tensor, Tensor]:
    """BERT's masking as a pure function of given uniforms.

    Args:
        ids: (batch, length).
        words: (batch, length), the candidates.
        select: uniforms (batch, length); below `probability` a word is selected.
        kind: uniforms (batch, length); below 0.8 it is masked, below 0.9 replaced, else kept.
        random_ids: (batch, length), what replaces.
        mask_id: of the mask.
        probability: of selection.
        ensure_one: select the word of the smallest uniform in a row where none was.

    Returns:
        Masked ids and labels, both (batch, length); labels are -100 where nothing was selected.
    """
    selected = words & (select < probability)
    if ensure_one:
        lowest = torch.zeros_like(words).scatter_(
            1, select.masked_fill(~words, 2.0).argmin(1, keepdim=True), True
        )
        selected |= lowest & words & ~selected.any(1, keepdim=True)
    masked = torch.where(selected & (kind < 0.8), torch.full_like(ids, mask_id), ids)
    masked = torch.where(selected & (kind >= 0.8) & (kind < 0.9), random_ids.to(ids.dtype), masked)
    return masked, torch.where(selected, ids, torch.full_like(ids, IGNORED))
