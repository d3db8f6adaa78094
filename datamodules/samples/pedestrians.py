"""Drawn pedestrians with long captions in two styles, in UFine6926's format.

Identities come in pairs that differ in one detail alone, which both captions name last.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from datamodules.samples.writing import ensure_sample

COLOURS = {
    "red": (200, 40, 40),
    "green": (50, 150, 60),
    "blue": (40, 80, 200),
    "yellow": (230, 200, 50),
    "white": (235, 235, 235),
    "black": (30, 30, 30),
    "purple": (130, 60, 160),
    "orange": (235, 130, 40),
}
SKIN, SIZE = (224, 182, 150), (128, 48)


class Look(NamedTuple):
    """What an identity wears: names of colours, and lengths and things by name."""

    hair: str
    long_hair: bool
    top: str
    pattern: str
    bottom: str
    skirt: bool
    bag: str
    bag_colour: str
    shoes: str


def write_pedestrians(target: Path, identities: int) -> None:
    """Write the sample unless it is there.

    Args:
        target: root of the data set.
        identities: how many; a quarter of them (of whole pairs) is to test on.
    """
    ensure_sample(
        target, {"pedestrians": identities, "version": 1}, lambda folder: _write(folder, identities)
    )


def _write(folder: Path, identities: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    records: list[dict[str, Any]] = []
    looks = _looks(identities, rng)
    first_test = identities - max(2, identities // 4 // 2 * 2)
    for number, look in enumerate(looks):
        for _ in range(3):
            path = f"images/{len(records) + 1}.jpg"
            step = bool(rng.integers(2))
            _draw(look, step, rng).save(folder / path, quality=92)
            captions = [_plain(look, step), _flowery(look, step)]
            split = "train" if number < first_test else "test"
            records.append({"split": split, "id": number + 1, "file_path": path, "captions": captions})
    (folder / "UFine6926_Annotations.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def _looks(count: int, rng: np.random.Generator) -> list[Look]:
    names, found = list(COLOURS), list[Look]()

    def colour() -> str:
        return names[rng.integers(len(names))]

    while len(found) < count:
        look = Look(
            ("black", "yellow", "orange", "white")[rng.integers(4)],
            bool(rng.integers(2)),
            colour(),
            ("plain", "striped", "dotted")[rng.integers(3)],
            colour(),
            bool(rng.integers(2)),
            ("shoulder bag", "backpack", "handbag")[rng.integers(3)],
            colour(),
            colour(),
        )
        other = names[(names.index(look.shoes) + 1 + int(rng.integers(len(names) - 1))) % len(names)]
        twin = look._replace(shoes=other)
        if look not in found and twin not in found:
            found += [look, twin]
    return found[:count]


def _plain(look: Look, step: bool) -> str:
    hair = "long, falling over the shoulders" if look.long_hair else "short and cut above the ears"
    bottom = "skirt that ends above the knees" if look.skirt else "pair of long trousers down to the ankles"
    pose = "walks with one leg before the other" if step else "stands still with both legs together"
    return (
        f"The picture shows a person on a street who is seen from the front. The hair is {look.hair} and it "
        f"is {hair}. The upper body is covered by a {look.pattern} {look.top} shirt with sleeves "
        f"that reach the "
        f"wrists. Below it the person wears a {look.bottom} {bottom}. The person carries a {look.bag_colour} "
        f"{look.bag}, and {pose}, with both arms hanging down at the sides of the body. On the feet of this "
        f"person there is a pair of {look.shoes} shoes."
    )


def _flowery(look: Look, step: bool) -> str:
    hair = "flows well below the neck" if look.long_hair else "barely reaches the ears"
    bottom = "short skirt" if look.skirt else "full-length trousers"
    pose = "caught in the middle of a stride" if step else "waiting quietly on the spot"
    return (
        f"Here we have a pedestrian, {pose}, whose {look.hair} hair {hair} and frames the face. Dressed for "
        f"the city, they have chosen a {look.top} top in a {look.pattern} fabric, long-sleeved and "
        f"neatly fitted "
        f"around the waist, and have matched it with {look.bottom} {bottom}. A {look.bag} in "
        f"{look.bag_colour} goes along with the outfit and holds, one supposes, all the small "
        f"things of the day. The look is "
        f"finished, at the very bottom, by footwear whose colour is {look.shoes}."
    )


def _draw(look: Look, step: bool, rng: np.random.Generator) -> Image.Image:
    height, width = SIZE
    ground = rng.integers(90, 170, 3)
    picture = Image.new("RGB", (width, height), tuple(int(c) for c in ground))
    pen, left = ImageDraw.Draw(picture), int(rng.integers(-3, 4)) + 12
    box = (left, 0, left + 24, 0)

    def block(x0: int, y0: int, x1: int, y1: int, colour: tuple[int, int, int]) -> None:
        pen.rectangle((box[0] + x0, y0, box[0] + x1, y1), fill=colour)

    block(5, 4, 19, 30 if look.long_hair else 14, COLOURS[look.hair])
    block(8, 9, 16, 22, SKIN)
    block(0, 26, 24, 64, COLOURS[look.top])
    mark = tuple(255 - c for c in COLOURS[look.top])
    for y in range(29, 63, 6) if look.pattern != "plain" else ():
        if look.pattern == "striped":
            block(0, y, 24, y + 1, mark)  # type: ignore[arg-type]
        else:
            for x in range(2, 24, 6):
                block(x, y, x + 2, y + 2, mark)  # type: ignore[arg-type]
    gap = 4 if step else 1
    if look.skirt:
        block(0, 64, 24, 88, COLOURS[look.bottom])
    for x0, x1 in ((2, 11 - gap), (13 + gap, 22)):
        block(x0, 88 if look.skirt else 64, x1, 114, SKIN if look.skirt else COLOURS[look.bottom])
        block(x0 - 1, 114, x1 + 1, 122, COLOURS[look.shoes])
    bag = {"shoulder bag": (20, 52, 29, 70), "backpack": (-5, 28, 0, 54), "handbag": (-6, 64, 3, 78)}
    block(*bag[look.bag], COLOURS[look.bag_colour])
    noisy = np.asarray(picture, np.float64) * rng.uniform(0.8, 1.1) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
