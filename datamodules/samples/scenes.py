"""Drawn scenes with captions that say what is where, as tar shards, Karpathy's JSON and folders of classes.

A scene has two different objects in two cells of a grid; captions name them in reading order, and every other
one also says how they lie to each other, so that a bag of words does not tell the scenes apart.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from datamodules.samples.writing import ensure_sample

COLOURS = {
    "red": (215, 45, 45),
    "green": (50, 165, 65),
    "blue": (45, 85, 215),
    "yellow": (235, 210, 55),
    "purple": (145, 60, 175),
    "orange": (240, 140, 40),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
GRID = 3
TEMPLATES = ("a picture of a {}.", "a drawing of a {}.", "a {}.")


class Thing(NamedTuple):
    """An object of a scene.

    Args:
        colour: its name.
        shape: its name.
        cell: row by row.
    """

    colour: str
    shape: str
    cell: int

    @property
    def words(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


def draw_things(things: list[Thing], side: int, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `side` pixels on a noisy ground."""
    ground = rng.uniform(95, 160, 3) + rng.normal(0, 9, (side, side, 3))
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    pen, cell = ImageDraw.Draw(picture), side / GRID
    for thing in things:
        row, column = divmod(thing.cell, GRID)
        x, y = (cell * (place + rng.uniform(0.43, 0.57)) for place in (column, row))
        r = cell * rng.uniform(0.3, 0.4)
        fill = tuple(int(c) for c in (np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3)).clip(0, 255))
        box = (x - r, y - r, x + r, y + r)
        if thing.shape == "circle":
            pen.ellipse(box, fill)
        elif thing.shape == "square":
            pen.rectangle(box, fill)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
        else:
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    return picture


def draw_scene(rng: np.random.Generator) -> list[Thing]:
    """Two different things in reading order."""
    cells = sorted(rng.choice(GRID * GRID, 2, replace=False).tolist())
    kinds = rng.choice(len(COLOURS) * len(SHAPES), 2, replace=False).tolist()
    colours = list(COLOURS)
    return [
        Thing(colours[kind // 4], SHAPES[kind % 4], cell) for kind, cell in zip(kinds, cells, strict=True)
    ]


def captions_of(things: list[Thing]) -> list[str]:
    """What is there, and how it lies."""
    first, second = things
    (row, column), (below, right) = (divmod(thing.cell, GRID) for thing in things)
    if row == below:
        relation = f"a {first.words} left of a {second.words}"
    elif column == right:
        relation = f"a {second.words} below a {first.words}"
    else:
        side = "right" if right > column else "left"
        relation = f"a {second.words} below and {side} of a {first.words}"
    return [f"a {first.words} and a {second.words}", relation]


def write_scenes(target: Path, size: int = 600, image_size: int = 48, shards: int = 4, seed: int = 0) -> None:
    """Write the sample unless it is there.

    That is `train/00000.tar` and so on as img2dataset writes them, `test/*.jpg` and `scenes_karpathy.json` of
    a quarter as many scenes, and `zeroshot/COLOUR_SHAPE/*.jpg` of single things with `zeroshot.json`.

    Args:
        target: root of the data set.
        size: training scenes.
        image_size: side, pixels.
        shards: tars.
        seed: the same seed draws the same scenes.
    """
    settings = {"scenes": size, "image_size": image_size, "shards": shards, "seed": seed, "version": 1}

    def write(folder: Path) -> None:
        for part in ("train", "test", "zeroshot"):
            (folder / part).mkdir()
        _write_shards(folder / "train", size, image_size, shards, np.random.default_rng((seed, 0)))
        _write_test(folder, max(8, size // 4), image_size, np.random.default_rng((seed, 1)))
        _write_classes(folder, image_size, np.random.default_rng((seed, 2)))

    ensure_sample(target, settings, write)


def _jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def _write_shards(folder: Path, size: int, image_size: int, shards: int, rng: np.random.Generator) -> None:
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(size * shard // shards, size * (shard + 1) // shards):
                things = draw_scene(rng)
                caption = captions_of(things)[int(rng.integers(2))]
                key, picture = f"{shard:05d}{number:04d}", draw_things(things, image_size, rng)
                note = {"key": key, "caption": caption, "status": "success", "width": image_size}
                members = {"jpg": _jpeg(picture), "txt": caption.encode(), "json": json.dumps(note).encode()}
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _write_test(folder: Path, size: int, image_size: int, rng: np.random.Generator) -> None:
    images = []
    for number in range(size):
        things = draw_scene(rng)
        name = f"{number:05d}.jpg"
        (folder / "test" / name).write_bytes(_jpeg(draw_things(things, image_size, rng)))
        sentences = [
            {"raw": text, "tokens": text.split(), "imgid": number, "sentid": 2 * number + place}
            for place, text in enumerate(captions_of(things))
        ]
        images.append(
            {
                "filename": name,
                "split": "val" if number % 2 else "test",
                "imgid": number,
                "sentids": [sentence["sentid"] for sentence in sentences],
                "sentences": sentences,
            }
        )
    content = json.dumps({"images": images, "dataset": "scenes"})
    (folder / "scenes_karpathy.json").write_text(content, encoding="utf-8")


def _write_classes(folder: Path, image_size: int, rng: np.random.Generator) -> None:
    names = {}
    for colour in COLOURS:
        for shape in SHAPES:
            place = folder / "zeroshot" / f"{colour}_{shape}"
            place.mkdir()
            names[place.name] = f"{colour} {shape}"
            for number in range(3):
                things = [Thing(colour, shape, int(rng.integers(GRID * GRID)))]
                (place / f"{number}.jpg").write_bytes(_jpeg(draw_things(things, image_size, rng)))
    content = json.dumps({"classes": names, "templates": list(TEMPLATES)})
    (folder / "zeroshot.json").write_text(content, encoding="utf-8")
