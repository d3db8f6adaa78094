"""Drawn scenes in COCO's layout: shapes that hide each other, crowds, empty images, captions."""

import colorsys
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datamodules.samples.writing import ensure_sample

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

CATEGORIES = {1: "circle", 2: "square", 4: "triangle", 6: "star", 7: "cross", 9: "moon"}
"""Category ids have gaps, as COCO's do."""

EMPTY_SHARE = 0.08
HIDDEN = 0.2  # an object of which less is seen is not annotated
_FINE = 4  # shapes are drawn this many times larger and averaged down, for soft edges


@dataclass(frozen=True)
class SceneStyle:
    """How hard scenes are.

    Args:
        most: shapes in a scene, a crowd's not counted.
        radii: least and largest radius of a shape, as shares of the shorter side.
        crowds: share of scenes with a crowd.
        longest: longer side over the shorter one, at most.
        named: each kind of shape is a category; otherwise all are `shape`, since to find them is learned in
            minutes, and to tell them apart is not.
    """

    most: int = 7
    radii: tuple[float, float] = (0.06, 0.28)
    crowds: float = 0.15
    longest: float = 1.5
    named: bool = True


def write_coco(
    root: Path, size: int = 200, image_size: int = 160, seed: int = 0, style: SceneStyle = SceneStyle()
) -> None:
    """Writes a COCO 2017 of drawn scenes into ``root``, unless it is there.

    That is ``{train,val}2017/<12 digits>.jpg``, ``annotations/instances_{train,val}2017.json`` (polygons of
    what is seen; run lengths for crowds) and ``annotations/captions_{train,val}2017.json`` (five an image).

    Args:
        root: folder that gets them.
        size: number of training images; a quarter as many are for validation.
        image_size: length of the shorter side, pixels.
        seed: the same seed gives the same scenes.
        style: of the scenes.

    Raises:
        MisconfigurationException: when something else is there.
    """
    settings: dict[str, Any] = {"size": size, "image_size": image_size, "seed": seed}
    if style != SceneStyle():
        settings["style"] = json.loads(json.dumps(vars(style)))  # as it is read back

    def write(folder: Path) -> None:
        (folder / "annotations").mkdir()
        for part, (split, count) in enumerate((("train2017", size), ("val2017", max(1, size // 4)))):
            rng = np.random.default_rng(2 * seed + part)
            _write_split(folder, split, count, image_size, 1 + 1_000_000 * part, rng, style)

    ensure_sample(root, settings, write)


def _write_split(
    root: Path,
    split: str,
    count: int,
    image_size: int,
    first_id: int,
    rng: np.random.Generator,
    style: SceneStyle,
) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for number in range(count):
        image_id = first_id + 37 * number
        name = f"{image_id:012d}.jpg"
        long = int(image_size * rng.uniform(1, style.longest))
        height, width = (image_size, long) if rng.random() < 0.7 else (long, image_size)
        scene = draw_scene(height, width, rng, number % round(1 / EMPTY_SHARE) == 5, style)
        Image.fromarray(scene.picture).save(root / split / name, quality=92)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
        for instance in scene.annotations:
            category = instance["category_id"] if style.named else 1
            objects.append(
                {"id": first_id + len(objects), "image_id": image_id, **instance, "category_id": category}
            )
        for text in _captions(scene.annotations):
            captions.append({"id": first_id + len(captions), "image_id": image_id, "caption": text})
    header = {
        "info": {"description": "Drawn scenes", "version": "1.0", "year": 2017},
        "licenses": [{"id": 1, "name": "procedural", "url": ""}],
        "images": images,
    }
    named = CATEGORIES if style.named else {1: "shape"}
    categories = [{"id": key, "name": name, "supercategory": "shape"} for key, name in named.items()]
    folder = root / "annotations"
    instances = {**header, "annotations": objects, "categories": categories}
    (folder / f"instances_{split}.json").write_text(json.dumps(instances))
    (folder / f"captions_{split}.json").write_text(json.dumps({**header, "annotations": captions}))


# Scenes


@dataclass
class Scene:
    """A picture and what is in it."""

    picture: NDArray[np.uint8]
    """(height, width, 3), RGB."""
    annotations: list[dict[str, Any]]
    """COCO's `category_id`, `bbox`, `area`, `iscrowd` and `segmentation`, one an object that is seen."""
    masks: list[Mask] = field(default_factory=list)
    """The pixels of each, with its holes; (height, width)."""


def draw_scene(
    height: int,
    width: int,
    rng: np.random.Generator,
    empty: bool = False,
    style: SceneStyle = SceneStyle(),
) -> Scene:
    """Draws some shapes over each other, and now and then a crowd of small ones behind them.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.
        rng: everything random comes from it.
        empty: a ground without shapes.
        style: how many shapes, how large.
    """
    picture = _ground(height, width, rng)
    side = min(height, width)
    layers: list[tuple[int, Mask, bool, int]] = []  # category, mask, crowd, pixels before others came
    if not empty:
        if rng.random() < style.crowds:
            category = int(rng.choice(list(CATEGORIES)))
            layers.append((category, _crowd(picture, category, side, rng), True, 0))
        for _ in range(int(rng.integers(1, style.most + 1))):
            category = int(rng.choice(list(CATEGORIES)))
            radius = side * float(np.exp(rng.uniform(*np.log(style.radii))))
            centre = (
                rng.uniform(0.5 * radius, width - 0.5 * radius),
                rng.uniform(0.5 * radius, height - 0.5 * radius),
            )
            mask = _stamp(picture, category, centre, radius, rng)
            layers = [(other, seen & ~mask, crowd, full) for other, seen, crowd, full in layers]
            layers.append((category, mask, False, int(mask.sum())))
    picture += rng.normal(0, rng.uniform(0.01, 0.05), picture.shape)
    kept = [layer for layer in layers if layer[1].sum() > max(12, HIDDEN * layer[3])]
    annotations = [_annotation(category, mask, crowd) for category, mask, crowd, _ in kept]
    masks = [mask for _, mask, _, _ in kept]
    return Scene((picture.clip(0, 1) * 255).round().astype(np.uint8), annotations, masks)


def _ground(height: int, width: int, rng: np.random.Generator) -> Floats:
    """A gradient between two dull colours with some thin lines; (height, width, 3)."""
    first, second = (_colour(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.25, 0.8)) for _ in range(2))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width]
    slope = 0.5 + 0.5 * (np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5))
    ground = first + (second - first) * slope[..., None]
    lines = Image.new("L", (width, height))
    draw = ImageDraw.Draw(lines)
    for _ in range(int(rng.integers(2, 7))):
        ends = rng.uniform(0, 1, 4) * (width, height, width, height)
        draw.line(tuple(ends), fill=int(rng.integers(60, 200)), width=int(rng.integers(1, 3)))
    return ground * (1 - 0.5 * np.asarray(lines)[..., None] / 255)


def _crowd(picture: Floats, category: int, side: int, rng: np.random.Generator) -> Mask:
    """A heap of ten to twenty small shapes of one kind; returns all their pixels."""
    height, width = picture.shape[:2]
    mask = np.zeros((height, width), np.bool_)
    middle = rng.uniform(0.25, 0.75, 2) * (width, height)
    for _ in range(int(rng.integers(10, 21))):
        centre = np.clip(middle + rng.normal(0, 0.12 * side, 2), 0, (width, height))
        mask |= _stamp(picture, category, (float(centre[0]), float(centre[1])), 0.05 * side, rng)
    return mask


def _stamp(
    picture: Floats, category: int, centre: tuple[float, float], radius: float, rng: np.random.Generator
) -> Mask:
    """Draws one shape with a darker rim into ``picture``; returns its pixels."""
    angle = rng.uniform(-0.5, 0.5)
    colour = _colour(rng.random(), rng.uniform(0.5, 1.0), rng.uniform(0.55, 1.0))
    size = picture.shape[1], picture.shape[0]
    outline = _outline(CATEGORIES[category], angle) * radius + np.array(centre)
    inside = _outline(CATEGORIES[category], angle) * (0.85 * radius) + np.array(centre)
    cover, core = _coverage(outline, size), _coverage(inside, size)
    picture *= 1 - cover[..., None]
    picture += cover[..., None] * colour * (0.6 + 0.4 * core[..., None])
    return cover > 0.5


def _coverage(outline: Floats, size: tuple[int, int]) -> Floats:
    """Share of each pixel that lies within a polygon; (height, width)."""
    width, height = size
    fine = Image.new("L", (width * _FINE, height * _FINE))
    ImageDraw.Draw(fine).polygon([tuple(point) for point in outline * _FINE], fill=255)
    return np.asarray(fine.reduce(_FINE), np.float64) / 255


def _outline(shape: str, angle: float) -> Floats:
    """Corners of a shape in the unit circle, rotated by ``angle``; (n, 2) as (x, y)."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    match shape:
        case "square":
            points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8
        case "triangle":
            points = np.array([[0, -1], [0.95, 0.75], [-0.95, 0.75]])
        case "star":
            corners = np.arange(10) * np.pi / 5 - np.pi / 2
            reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
            points = np.stack([np.cos(corners) * reach, np.sin(corners) * reach], axis=1)
        case "cross":
            arm, end = 0.32, 0.95
            corner = [[arm, -end], [arm, -arm], [end, -arm]]
            quarter = np.array([[0, -1], [1, 0]])  # (x, y) turned by 90 degrees is (-y, x)
            turned = [np.array(corner) @ np.linalg.matrix_power(quarter.T, step) for step in range(4)]
            points = np.concatenate(turned)
        case "moon":
            outer = turn[6:43]  # from 45 to 315 degrees
            bow = np.stack([np.cos(outer), np.sin(outer)], axis=1)
            bite = bow[::-1] * (0.45, 1) + (0.55 * bow[0, 0], 0)  # flatter, between the same two tips
            points = np.concatenate([bow, bite])
        case _:
            points = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 0.9
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return points @ rotation


def _colour(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


# Annotations


def _annotation(category: int, mask: Mask, crowd: bool) -> dict[str, Any]:
    from scipy.ndimage import binary_fill_holes

    if not crowd:
        mask = binary_fill_holes(mask)  # polygons, whose union counts, have no words for a hole
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "category_id": category,
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": _run_lengths(mask) if crowd else _polygons(mask),
    }


def _run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed run lengths: of zeros, ones, zeros, ... down the columns."""
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def _polygons(mask: Mask) -> list[list[float]]:
    """Outlines of the parts of a mask as [x, y, x, y, ...], pixels' corners counted from 0."""
    from contourpy import contour_generator

    padded = np.pad(mask.astype(np.float64), 1)
    lines = contour_generator(z=padded).lines(0.5)
    outlines = [np.round(np.asarray(line)[:-1] - 0.5, 1) for line in lines if len(line) > 3]
    return [outline.flatten().tolist() for outline in outlines]


_COUNTS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
_CAPTIONS = ("{}.", "A picture of {}.", "{} on a plain ground.", "A drawing with {}.", "There is {} here.")


def _captions(annotations: list[dict[str, Any]]) -> list[str]:
    """Five sentences on the same things."""
    counts = Counter(CATEGORIES[item["category_id"]] for item in annotations if not item["iscrowd"])
    parts = [f"{_COUNTS[count]} {_plural(name, count)}" for name, count in counts.items()]
    crowds = [CATEGORIES[item["category_id"]] for item in annotations if item["iscrowd"]]
    parts += [f"many small {_plural(name, 2)}" for name in crowds]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts) or "nothing"
    return [text[:1].upper() + text[1:] for text in (template.format(listed) for template in _CAPTIONS)]


def _plural(name: str, count: int) -> str:
    if count == 1:
        return name
    return f"{name}es" if name.endswith("s") else f"{name}s"
