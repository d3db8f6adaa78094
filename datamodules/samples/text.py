"""Procedural English: sentences of a small grammar, paragraphs with a topic; enough for a tiny model to
learn.
"""

from pathlib import Path

import numpy as np

from datamodules.samples.writing import ensure_sample

_TOPICS = {
    "harbour": (
        ["sailor", "captain", "skipper"],
        ["boat", "net", "lantern", "rope"],
        ["the pier", "the bay"],
    ),
    "orchard": (
        ["farmer", "gardener", "neighbour"],
        ["apple", "basket", "ladder", "tree"],
        ["the hill", "the barn"],
    ),
    "library": (
        ["student", "teacher", "writer"],
        ["book", "letter", "map", "desk"],
        ["the hall", "the window"],
    ),
    "kitchen": (
        ["cook", "baker", "guest"],
        ["bread", "kettle", "spoon", "oven"],
        ["the table", "the cellar"],
    ),
    "railway": (
        ["driver", "guard", "traveller"],
        ["train", "ticket", "signal", "bell"],
        ["the bridge", "the town"],
    ),
}
_ADJECTIVES = ["old", "small", "bright", "heavy", "quiet", "broken", "new", "red"]
_VERBS = [("carry", "carries"), ("find", "finds"), ("watch", "watches"), ("mend", "mends"), ("lose", "loses")]
_OPENERS = ["In the morning", "After the rain", "Every winter", "Once a week", "At noon", "Without a word"]
_TAILS = ["because it is late", "before the others come", "and nobody is surprised", "as it was agreed"]


def write_text(root: Path, size: int = 200_000, seed: int = 0) -> None:
    """Writes `root/train.txt`, `root/valid.txt` and `root/test.txt`, unless they are there.

    Args:
        root: folder of the corpus.
        size: characters of the training text; a tenth as many are in each of the others.
        seed: the same seed gives the same bytes.

    Raises:
        MisconfigurationException: when something else is there.
    """
    settings = {"size": size, "seed": seed}

    def write(folder: Path) -> None:
        for part, (name, count) in enumerate((("train", size), ("valid", size // 10), ("test", size // 10))):
            (folder / f"{name}.txt").write_text(prose(count, 3 * seed + part), encoding="utf-8")

    ensure_sample(root, settings, write)


def prose(size: int, seed: int) -> str:
    """At least `size` characters of paragraphs, each about one topic."""
    rng = np.random.default_rng(seed)
    paragraphs: list[str] = []
    written = 0
    while written < size:
        topic = str(rng.choice(list(_TOPICS)))
        sentences = [_sentence(topic, rng) for _ in range(int(rng.integers(3, 7)))]
        paragraphs.append(f"The {topic}. " + " ".join(sentences))
        written += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs) + "\n"


def _sentence(topic: str, rng: np.random.Generator) -> str:
    people, things, places = _TOPICS[topic]
    many = bool(rng.random() < 0.4)
    subject = str(rng.choice(people)) + ("s" if many else "")
    verb = _VERBS[int(rng.integers(len(_VERBS)))][0 if many else 1]
    article = "the" if rng.random() < 0.7 else ("some" if many else "one")
    thing = f"{rng.choice(_ADJECTIVES)} {rng.choice(things)}"
    words = f"{article} {subject} {verb} the {thing} near {rng.choice(places)}"
    if rng.random() < 0.5:
        words = f"{rng.choice(_OPENERS)}, {words}"
    if rng.random() < 0.5:
        words = f"{words}, {rng.choice(_TAILS)}"
    return words[0].upper() + words[1:] + "."
