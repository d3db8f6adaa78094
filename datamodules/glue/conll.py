"""Named entities as CoNLL-2003 has them: a token a line, IOB1 or IOB2."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.reading import DataError
from datamodules.text.corpora import opened

DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class TaggedSentence:
    """Words and the tags of their entities, in IOB2."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def tag_names(types: Sequence[str]) -> list[str]:
    """Tags in the order of their numbers: `O`, then `B-` and `I-` of each type."""
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]


def to_iob2(tags: Sequence[str]) -> list[str]:
    """IOB1 or IOB2 as IOB2: what begins an entity is `B-` (conlleval's rule)."""
    result: list[str] = []
    before = "O"
    for tag in tags:
        continues = tag[:1] == "I" and before != "O" and before[2:] == tag[2:]
        result.append(tag if tag == "O" or tag[:1] == "B" or continues else f"B-{tag[2:]}")
        before = tag
    return result


def read_conll(path: Path, types: Sequence[str]) -> list[TaggedSentence]:
    """The sentences of a file: word first, tag last, separated by blanks; documents' marks are left out.

    Args:
        path: of the file.
        types: of entities.

    Raises:
        DataError: a line has fewer than two columns, or a tag that is none of them; names file and line.
        CorruptSampleError: it is no UTF-8.
    """
    sentences: list[TaggedSentence] = []
    words: list[str] = []
    tags: list[str] = []

    def finish() -> None:
        if words:
            sentences.append(TaggedSentence(tuple(words), tuple(to_iob2(tags))))
            words.clear()
            tags.clear()

    with opened(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            cells = line.split()
            if not cells or cells[0] == DOCUMENT:
                finish()
                continue
            if len(cells) < 2:
                raise DataError(
                    f"{path}, line {number}: {len(cells)} columns, expected a word first and a tag last."
                )
            prefix, _, kind = cells[-1].partition("-")
            if cells[-1] != "O" and (prefix not in ("B", "I") or kind not in types):
                raise DataError(
                    f"{path}, line {number}: the tag is '{cells[-1]}', expected O, or B- or I- with "
                    f"{', '.join(types)}."
                )
            words.append(cells[0])
            tags.append(cells[-1])
    finish()
    return sentences
