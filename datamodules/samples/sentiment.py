"""A procedural language of 300 tokens with a sentiment: a task in SST-2's layout, a general corpus in which
hardly any word has one, and a tokenizer that knows all words.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from datamodules.samples.writing import ensure_sample

LENGTH = 10
"""Words of a sentence."""

SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", *(f"<unused{number}>" for number in range(6)))
POSITIVE = [
    "adores",
    "amazing",
    "brave",
    "bright",
    "charming",
    "clever",
    "delight",
    "elegant",
    "fresh",
    "gentle",
    "glad",
    "good",
    "happy",
    "joyful",
    "kind",
    "lovely",
    "superb",
    "sweet",
    "warm",
    "wise",
]
NEGATIVE = [
    "angry",
    "awful",
    "bad",
    "bitter",
    "boring",
    "cold",
    "cruel",
    "dreadful",
    "dull",
    "empty",
    "gloomy",
    "grim",
    "hates",
    "lazy",
    "mean",
    "nasty",
    "poor",
    "sad",
    "ugly",
    "weak",
]
_SYLLABLES = ("ka lo mi nu ta", "re si do fa gu", "ba ce di fo ha ju ke li mo pa")
NEUTRAL = ["".join(parts) for parts in product(*(syllables.split() for syllables in _SYLLABLES))]
VOCABULARY = (*SPECIAL, *POSITIVE, *NEGATIVE, *NEUTRAL)
"""The tokens in the order of their ids: 10 special ones, 20 positive words, 20 negative, 250 neutral."""


def write_sentiment(root: Path, size: int = 4000, seed: int = 0) -> None:
    """Writes `root/SST-2/{train,dev,test}.tsv`, `root/corpus.txt` and `root/tokenizer` where they are not.

    Args:
        root: folder of the sample.
        size: sentences of the training set; a quarter as many are in each of the others, twice as many in
            the corpus.
        seed: the same seed gives the same bytes.

    Raises:
        MisconfigurationException: something else is there.
    """

    def write(folder: Path) -> None:
        (folder / "SST-2").mkdir()
        for part, (name, count) in enumerate((("train", size), ("dev", size // 4), ("test", size // 4))):
            rows = labelled_sentences(count, 3 * seed + part)
            test = name == "test"
            lines = ["index\tsentence" if test else "sentence\tlabel"]
            lines += [f"{i}\t{text}" if test else f"{text} \t{label}" for i, (text, label) in enumerate(rows)]
            (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        corpus = general_sentences(2 * size, seed)
        (folder / "corpus.txt").write_text("\n".join(corpus) + "\n", encoding="utf-8")
        write_tokenizer(folder / "tokenizer", VOCABULARY)

    ensure_sample(root, {"size": size, "seed": seed}, write)


def labelled_sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences whose words are positive or negative with probability 0.2, and which prevail."""
    rng = np.random.default_rng([seed, 0])
    rows: list[tuple[str, int]] = []
    while len(rows) < count:
        words, score = _sentence(rng, 0.2, 0.2)
        if score:
            rows.append((words, int(score > 0)))
    return rows


def general_sentences(count: int, seed: int) -> list[str]:
    """Sentences whose words are positive with probability 0.012, and negative with 0.003."""
    rng = np.random.default_rng([seed, 1])
    return [_sentence(rng, 0.012, 0.003)[0] for _ in range(count)]


def _sentence(rng: np.random.Generator, positive: float, negative: float) -> tuple[str, int]:
    kinds = rng.choice(3, size=LENGTH, p=[positive, negative, 1 - positive - negative])
    lists = (POSITIVE, NEGATIVE, NEUTRAL)
    words = [lists[kind][int(rng.integers(len(lists[kind])))] for kind in kinds]
    return " ".join(words), int((kinds == 0).sum() - (kinds == 1).sum())


def write_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    """A tokenizer of whole words that transformers loads, with `<s>` before a sentence and `</s>` behind it.

    Args:
        folder: that `AutoTokenizer.from_pretrained` takes.
        vocabulary: tokens in the order of their ids; has `<pad>`, `</s>`, `<unk>` and `<s>`.
    """
    ids = {token: number for number, token in enumerate(vocabulary)}
    special = [token for token in vocabulary if token.startswith("<") and token.endswith(">")]
    added = [
        {"id": ids[token], "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in special
    ]
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>")]
    sentence = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [pieces[0], sentence, pieces[1]],
            "pair": [pieces[0], sentence, pieces[1], second, pieces[1]],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ("<s>", "</s>")
            },
        },
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
    }
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": [token for token in special if token not in names.values()],
        **names,
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
