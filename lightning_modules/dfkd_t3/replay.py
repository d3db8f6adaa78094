"""The last generated batches, against forgetting (section 2.4)."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_modules.dfkd_t3.bridge import WrittenText


class ReplayBuffer:
    """The last batches of hard tokens, as int32 in the CPU's memory.

    Args:
        capacity: batches that are kept.
        pad: id of the padding.
    """

    def __init__(self, capacity: int, pad: int) -> None:
        self.pad = pad
        self._batches: deque[tuple[Tensor, Tensor]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, text: WrittenText) -> None:
        """Keep a batch; the oldest one goes where there are too many."""
        self._batches.append((text.ids.cpu().int(), text.mask.sum(dim=1).cpu().int()))

    def draw(self, count: int, device: torch.device) -> WrittenText:
        """`count` texts, each of a random batch that is kept."""
        chosen = []
        for batch in torch.randint(len(self._batches), (count,)).tolist():
            ids, lengths = self._batches[batch]
            row = int(torch.randint(len(ids), ()))
            chosen.append(ids[row, : int(lengths[row])].long())
        return padded(chosen, self.pad, device)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors."""
        return {"ids": [ids for ids, _ in self._batches], "lengths": [n for _, n in self._batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._batches.clear()
        self._batches.extend(zip(state["ids"], state["lengths"], strict=True))


def padded(rows: list[Tensor], pad: int, device: torch.device) -> WrittenText:
    """Texts of different lengths as one batch."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = True
    return WrittenText(ids.to(device), mask.to(device))


def together(texts: list[WrittenText], pad: int) -> WrittenText:
    """Several batches as one."""
    longest = max(text.ids.shape[1] for text in texts)
    ids = [_widened(text.ids, longest, pad) for text in texts]
    masks = [_widened(text.mask, longest, False) for text in texts]
    return WrittenText(torch.cat(ids), torch.cat(masks))


def _widened(tensor: Tensor, length: int, value: int | bool) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)
