"""Procedural pictures of one textured shape on a cluttered ground.

A class is a shape, a texture and a hue. Position, scale, rotation, contrast, ground, clutter and noise are
random, and hue and texture are now and then those of another class, so that no single cue is enough.
"""

import colorsys

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SHAPES = ("disk", "square", "triangle", "ring", "cross", "flower", "crescent", "bar", "bowtie", "arch")
TEXTURES = (
    "plain",
    "striped",
    "dotted",
    "checked",
    "hooped",
    "shaded",
    "gridded",
    "rayed",
    "hatched",
    "waved",
)
MAX_CLASSES = len(SHAPES) * len(TEXTURES)

_MISLEADING = 0.35  # how often a picture has any texture, and how often any hue, whatever its class


def class_parts(label: int) -> tuple[int, int]:
    """Shape and texture of a class: all pairs differ for labels 0..99, and the first ten differ in both."""
    return label % 10, (label // 10 + 3 * label) % 10


def class_name(label: int) -> str:
    """Such as ``dotted_ring``."""
    shape, texture = class_parts(label)
    return f"{TEXTURES[texture]}_{SHAPES[shape]}"


def draw_picture(label: int, height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws a picture of a class.

    Args:
        label: the class, 0..99.
        height: of the picture, pixels.
        width: of the picture, pixels.
        rng: everything random comes from it.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    shape, texture = class_parts(label)
    hue = (label % 10) / 10 + rng.normal(0, 0.07)
    if rng.random() < _MISLEADING:
        texture = int(rng.integers(10))
    if rng.random() < _MISLEADING:
        hue = rng.random()
    side = min(height, width)
    y, x = np.mgrid[0:height, 0:width] * (2.0 / side)  # the shorter side is 2 long
    picture = _ground(y, x, rng)
    for _ in range(rng.integers(2, 5)):
        _stamp(picture, y, x, int(rng.integers(10)), 0, rng.random(), rng.uniform(0.12, 0.3), rng)
    _stamp(picture, y, x, shape, texture, hue, rng.uniform(0.4, 0.75), rng)
    picture += rng.normal(0, rng.uniform(0.02, 0.14), picture.shape)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _ground(y: Floats, x: Floats, rng: np.random.Generator) -> Floats:
    """A gradient between two dull colours, with a faint wave over it; (height, width, 3)."""
    first, second = (_colour(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.8)) for _ in range(2))
    angle = rng.uniform(0, 2 * np.pi)
    slope = 0.5 + 0.35 * (np.cos(angle) * (x - x.mean()) + np.sin(angle) * (y - y.mean()))
    wave = 0.06 * np.sin(rng.uniform(2, 9) * (x * np.sin(angle) - y * np.cos(angle)) + rng.uniform(0, 6))
    return first + (second - first) * slope[..., None] + wave[..., None]


def _stamp(
    picture: Floats,
    y: Floats,
    x: Floats,
    shape: int,
    texture: int,
    hue: float,
    radius: float,
    rng: np.random.Generator,
) -> None:
    """Draws one shape into ``picture``; its centre may lie anywhere that leaves most of it inside."""
    centre_y = rng.uniform(0.7 * radius, y[-1, 0] - 0.7 * radius)
    centre_x = rng.uniform(0.7 * radius, x[0, -1] - 0.7 * radius)
    angle = rng.uniform(-0.8, 0.8)
    edge = 2.5 / (radius * min(picture.shape[:2]))  # about a pixel, in the shape's units
    window = (_around(y[:, 0], centre_y, 1.2 * radius), _around(x[0], centre_x, 1.2 * radius))
    picture, du, dv = picture[window], (x[window] - centre_x) / radius, (y[window] - centre_y) / radius
    u, v = np.cos(angle) * du + np.sin(angle) * dv, np.cos(angle) * dv - np.sin(angle) * du
    cover = (_shape(shape, u, v) / edge + 0.5).clip(0, 1)[..., None]
    light, dark = _colour(hue, 0.75, rng.uniform(0.75, 1.0)), _colour(hue + 0.08, 0.9, rng.uniform(0.1, 0.35))
    mix = _texture(texture, u, v)[..., None]
    picture *= 1 - cover
    picture += cover * (dark + (light - dark) * mix)


def _around(axis: Floats, centre: float, reach: float) -> slice:
    """The part of a sorted axis within ``reach`` of ``centre``."""
    low, high = np.searchsorted(axis, (centre - reach, centre + reach))
    return slice(int(low), int(high))


def _shape(shape: int, u: Floats, v: Floats) -> Floats:
    """Roughly the signed distance to the edge of a shape in the unit disk: positive inside."""
    radius, box = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    match SHAPES[shape]:
        case "disk":
            return 0.9 - radius
        case "square":
            return 0.78 - box
        case "triangle":
            return np.minimum(0.5 - v, (v + 1) / 2 - 0.87 * np.abs(u))
        case "ring":
            return 0.24 - np.abs(radius - 0.72)
        case "cross":
            return np.minimum(np.maximum(0.27 - np.abs(u), 0.27 - np.abs(v)), 0.95 - box)
        case "flower":
            return 0.58 + 0.34 * np.sin(5 * np.arctan2(u, v) + np.pi / 2) - radius
        case "crescent":
            return np.minimum(0.95 - radius, np.hypot(u - 0.45, v) - 0.7)
        case "bar":
            return np.minimum(0.98 - np.abs(u), 0.3 - np.abs(v))
        case "bowtie":
            return np.minimum(0.9 - np.abs(u), 0.72 * np.abs(u) + 0.05 - np.abs(v))
        case _:
            return np.minimum(np.minimum(0.95 - radius, radius - 0.45), 0.35 - v)


def _texture(texture: int, u: Floats, v: Floats) -> Floats:
    """How much of the light colour a place gets, 0..1."""
    match TEXTURES[texture]:
        case "plain":
            return np.ones_like(u)
        case "striped":
            return _wave(7 * u)
        case "dotted":
            return 1 - _wave(9 * u) * _wave(9 * v)
        case "checked":
            return _step(np.sin(6 * u) * np.sin(6 * v))
        case "hooped":
            return _wave(11 * np.hypot(u, v))
        case "shaded":
            return ((v + 1) / 2).clip(0, 1)
        case "gridded":
            return np.maximum(_wave(8 * u), _wave(8 * v))
        case "rayed":
            return _wave(6 * np.arctan2(v, u))
        case "hatched":
            return _wave(9 * (u + v))
        case _:
            return _wave(8 * v + 2.5 * np.sin(4 * u))


def _wave(phase: Floats) -> Floats:
    return _step(np.sin(phase))


def _step(values: Floats) -> Floats:
    """A soft step at zero."""
    return (0.5 + 2 * values).clip(0, 1)


def _colour(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))
