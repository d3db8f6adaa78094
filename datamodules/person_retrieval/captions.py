"""Captions to CLIP's tokens, long ones cut and counted."""

from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from datamodules.reading import DataError


class CaptionTokenizer:
    """CLIP's byte pairs with start and end mark and zeros after them; a mark that a caption spells is text.

    Args:
        context_length: tokens with both marks; of a longer caption the first are kept, and the end mark.
    """

    def __init__(self, context_length: int) -> None:
        if context_length < 3:
            raise ValueError(f"context_length={context_length}: it must be at least 3.")
        self.context_length = context_length
        self._bytes = SimpleTokenizer(context_length=context_length)

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption without marks, however many."""
        for mark in ("<start_of_text>", "<end_of_text>"):
            caption = caption.replace(mark, mark.replace("_", " "))
        return self._bytes.encode(caption)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, int]:
        """Ids (n, context_length), int64, and how many captions were cut."""
        ids, cut = torch.zeros(len(captions), self.context_length, dtype=torch.int64), 0
        for row, caption in zip(ids, captions, strict=True):
            tokens = self.encode(caption)
            cut += len(tokens) > self.context_length - 2
            tokens = tokens[: self.context_length - 2]
            marked = [self._bytes.sot_token_id, *tokens, self._bytes.eot_token_id]
            row[: len(marked)] = torch.tensor(marked)
        return ids, cut


def sentences_of(query: str | None, queries: Path | None) -> list[str]:
    """A user's sentence, or those of a file, one a line; empty where there is neither.

    Raises:
        DataError: one is blank; names file and line.
    """
    captions = [query] if query is not None else []
    if queries is not None:
        captions = queries.read_text(encoding="utf-8").splitlines()
        while captions and not captions[-1].strip():
            captions.pop()
    if query is not None or queries is not None:
        blank = next((number for number, text in enumerate(captions, 1) if not text.strip()), None)
        if blank is not None or not captions:
            where = f"{queries}, line {blank or 1}" if queries else "query"
            raise DataError(f"{where}: it is empty, expected a sentence.")
    return captions
