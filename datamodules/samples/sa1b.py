"""Drawn scenes with masks in SA-1B's layout, and detections for those of COCO's."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.coco.segmentation import encode_mask
from datamodules.samples.coco import SceneStyle, draw_scene, write_coco
from datamodules.samples.writing import ensure_sample

STYLE = SceneStyle(most=6, radii=(0.1, 0.3), crowds=0.0, longest=1.5)


def write_sa1b(
    root: Path,
    size: int = 64,
    image_size: int = 96,
    tars: int = 2,
    seed: int = 0,
    style: SceneStyle = STYLE,
) -> None:
    """Writes drawn scenes as SA-1B publishes its pictures into ``root``, unless they are there.

    Args:
        root: folder that gets them.
        size: number of pictures.
        image_size: length of the shorter side, pixels.
        tars: files `sa_000000.tar`, ... that they are in; 0 writes pairs of files instead.
        seed: the same seed gives the same scenes.
        style: of the scenes.

    Raises:
        MisconfigurationException: when something else is there.
    """
    settings: dict[str, Any] = {"size": size, "image_size": image_size, "tars": tars, "seed": seed}
    if style != STYLE:
        settings["style"] = json.loads(json.dumps(vars(style)))

    def write(folder: Path) -> None:
        rng = np.random.default_rng(seed)
        for part, numbers in enumerate(np.array_split(np.arange(size), max(1, tars))):
            files: dict[str, bytes] = {}
            for number in numbers.tolist():
                files |= _pair(223_750 + 41 * number, number, image_size, style, rng)
            if tars:
                _write_tar(folder / f"sa_{part:06d}.tar", files)
            else:
                for name, content in files.items():
                    (folder / name).write_bytes(content)

    ensure_sample(root, settings, write)


def _pair(
    image_id: int, number: int, image_size: int, style: SceneStyle, rng: np.random.Generator
) -> dict[str, bytes]:
    """The two files of a picture."""
    long = int(image_size * rng.uniform(1, style.longest))
    height, width = (image_size, long) if rng.random() < 0.7 else (long, image_size)
    scene = draw_scene(height, width, rng, style=style)
    picture = io.BytesIO()
    Image.fromarray(scene.picture).save(picture, format="JPEG", quality=92)
    image = {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"}
    annotations = [_annotation(1000 * number + place, mask, rng) for place, mask in enumerate(scene.masks)]
    notes = {"image": image, "annotations": annotations}
    return {f"sa_{image_id}.jpg": picture.getvalue(), f"sa_{image_id}.json": json.dumps(notes).encode()}


def _annotation(key: int, mask: NDArray[np.bool_], rng: np.random.Generator) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    inside = np.argwhere(mask)[rng.integers(int(mask.sum()))]
    return {
        "id": key,
        "segmentation": encode_mask(mask),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(mask.sum()),
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "crop_box": [0, 0, mask.shape[1], mask.shape[0]],
        "point_coords": [[float(inside[1]), float(inside[0])]],
    }


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_prompted_coco(root: Path, size: int = 40, image_size: int = 96, seed: int = 0) -> None:
    """Writes a COCO 2017 of drawn scenes, and what a detector might find in those of validation.

    `detections_val2017.json` has COCO's results format: each box is moved a little, some are missed, and
    there are some where nothing is.

    Args:
        root: folder that gets them, unless they are there.
        size: number of training images; a quarter as many are for validation.
        image_size: length of the shorter side, pixels.
        seed: the same seed gives the same scenes and detections.
    """
    write_coco(root, size, image_size, seed, STYLE)
    path = root / "detections_val2017.json"
    if not path.exists():
        truth = json.loads((root / "annotations" / "instances_val2017.json").read_text())
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(_detections(truth, np.random.default_rng(seed))))
        unfinished.replace(path)


def _detections(truth: dict[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    for entry in truth["annotations"]:
        if rng.random() < 0.1:
            continue
        x, y, width, height = entry["bbox"]
        moved = np.array([x, y, width, height]) + rng.normal(0, 0.03, 4) * (width, height, width, height)
        found.append(_detection(entry["image_id"], entry["category_id"], moved, rng.uniform(0.5, 1)))
    for image in truth["images"]:
        side = 0.2 * min(image["width"], image["height"])
        box = np.array([*rng.uniform(0, side, 2), side, side])
        found.append(_detection(image["id"], 1, box, rng.uniform(0.05, 0.4)))
    return found


def _detection(image_id: int, category: int, box: NDArray[np.float64], score: float) -> dict[str, Any]:
    numbers = [round(float(value), 2) for value in box]
    return {"image_id": image_id, "category_id": category, "bbox": numbers, "score": round(score, 4)}
