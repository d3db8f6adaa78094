"""Which files are real and which generated, in ForenSynths / UniversalFakeDetect and in GenImage."""

import os
import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Layout = Literal["universal", "genimage"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")

UNIVERSAL = {
    "progan": "ProGAN",
    "cyclegan": "CycleGAN",
    "biggan": "BigGAN",
    "stylegan": "StyleGAN",
    "gaugan": "GauGAN",
    "stargan": "StarGAN",
    "deepfake": "Deepfakes",
    "seeingdark": "SITD",
    "san": "SAN",
    "crn": "CRN",
    "imle": "IMLE",
    "guided": "Guided",
    "ldm_200": "LDM 200 steps",
    "ldm_200_cfg": "LDM 200 steps CFG",
    "ldm_100": "LDM 100 steps",
    "glide_100_27": "Glide 100-27",
    "glide_50_27": "Glide 50-27",
    "glide_100_10": "Glide 100-10",
    "dalle": "DALL-E",
}
"""Folder and printed name of the 19 test sets, in the papers' order."""

GENIMAGE = {
    "Midjourney": "Midjourney",
    "stable_diffusion_v_1_4": "SD V1.4",
    "stable_diffusion_v_1_5": "SD V1.5",
    "ADM": "ADM",
    "glide": "GLIDE",
    "wukong": "Wukong",
    "VQDM": "VQDM",
    "BigGAN": "BigGAN",
}
"""Folder and printed name of the eight subsets, in the papers' order."""

LSUN_CLASSES = frozenset(
    [
        "airplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ]
)
"""Classes of ProGAN's training images; in ForenSynths they lie directly under `train`."""

REALS_OF = {"guided": "imagenet"}
"""Real images of a diffusion set; those of all others are `laion`."""


class Pair(NamedTuple):
    """Names of the real and the generated files of a set, relative to the root, sorted."""

    real: list[str]
    fake: list[str]


class Manifest(NamedTuple):
    """Sets by generator: to train on, to validate on (may be empty), to test on."""

    train: dict[str, Pair]
    val: dict[str, Pair]
    test: dict[str, Pair]


def printed_name(generator: str) -> str:
    """The name that the papers' tables have for a folder's."""
    return {**UNIVERSAL, **GENIMAGE}.get(generator, generator)


def in_paper_order(generators: Iterable[str], layout: Layout) -> list[str]:
    """The published order first, then the others by name."""
    order = list(UNIVERSAL if layout == "universal" else GENIMAGE)
    return sorted(generators, key=lambda name: (order.index(name) if name in order else len(order), name))


def read_layout(root: Path, layout: Layout, classes: Sequence[str] | None = None) -> Manifest:
    """Lists a data set.

    Args:
        root: of the data set.
        layout: how it is laid out.
        classes: of the training and validation images in the universal layout (`car`, `cat`, ...).

    Raises:
        FileNotFoundError: a set has no real or no generated file; names the folder.
    """
    return _universal(root, classes) if layout == "universal" else _genimage(root)


def image_files(folder: Path, root: Path) -> list[str]:
    """Names, relative to the root, of all images in and below a folder, sorted."""
    return sorted(
        os.path.relpath(os.path.join(place, name), root)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


# ForenSynths and UniversalFakeDetect: a file is real iff a component of its path is 0_real, fake iff 1_fake


def _universal(root: Path, classes: Sequence[str] | None) -> Manifest:
    diffusion = next(
        (path for path in (root / "diffusion_datasets", root / "test/diffusion_datasets") if path.is_dir()),
        None,
    )
    test = {
        folder.name: _marked(folder, root)
        for folder in _subfolders(root / "test")
        if folder.name != "diffusion_datasets"
    }
    if diffusion is not None:
        test |= _diffusion(diffusion, root)
    return Manifest(
        _by_generator(root / "train", root, classes), _by_generator(root / "val", root, classes), test
    )


def _by_generator(folder: Path, root: Path, classes: Sequence[str] | None) -> dict[str, Pair]:
    """Training folders: `<generator>/...` as in UniversalFakeDetect, or the classes of ProGAN as in
    ForenSynths.
    """
    names = {path.name for path in _subfolders(folder)}
    if not names:
        return {}
    if names <= LSUN_CLASSES:
        return {"progan": _marked(folder, root, classes)}
    return {name: _marked(folder / name, root, classes) for name in sorted(names)}


def _marked(folder: Path, root: Path, classes: Sequence[str] | None = None) -> Pair:
    real, fake = [], []
    for name in image_files(folder, root):
        components = Path(name).parts
        if classes is not None and not set(classes) & set(components):
            continue
        if "0_real" in components:
            real.append(name)
        elif "1_fake" in components:
            fake.append(name)
    return _checked(Pair(real, fake), folder, "0_real", "1_fake")


def _diffusion(folder: Path, root: Path) -> dict[str, Pair]:
    sources = {name: image_files(folder / name / "0_real", root) for name in ("imagenet", "laion")}
    found = {}
    for place in _subfolders(folder):
        if (place / "1_fake").is_dir():
            source = REALS_OF.get(place.name, "laion")
            pair = Pair(sources[source], image_files(place / "1_fake", root))
            found[place.name] = _checked(pair, place, f"../{source}/0_real", "1_fake")
    return found


# GenImage: <generator>/[<archive>/]{train,val}/{ai,nature}; by name, as the sorted folders would swap labels


def _genimage(root: Path) -> Manifest:
    splits: dict[str, dict[str, Pair]] = {"train": {}, "val": {}}
    for generator in _subfolders(root):
        for split, found in splits.items():
            places = [generator / split, *(archive / split for archive in _subfolders(generator))]
            existing = [place for place in places if place.is_dir()]
            if existing:
                real, fake = (
                    sorted(name for place in existing for name in image_files(place / kind, root))
                    for kind in ("nature", "ai")
                )
                found[generator.name] = _checked(Pair(real, fake), existing[0], "nature", "ai")
    return Manifest(splits["train"], {}, splits["val"])


def _checked(pair: Pair, folder: Path, real: str, fake: str) -> Pair:
    for files, kind, name in ((pair.real, "real", real), (pair.fake, "generated", fake)):
        if not files:
            raise FileNotFoundError(f"{folder} has no {kind} images: expected some under {folder / name}.")
    return pair


# Choosing


def held_out(pair: Pair, fraction: float) -> tuple[Pair, Pair]:
    """Files to train on, and files to validate on, by a hash of the file's name without its ending.

    A generated image that is named like the photograph that it was made from stays on its side.
    """

    def validates(name: str) -> bool:
        return zlib.crc32(Path(name).stem.encode("utf-8", "surrogateescape")) < fraction * 2**32

    return (
        Pair(*([name for name in files if not validates(name)] for files in pair)),
        Pair(*([name for name in files if validates(name)] for files in pair)),
    )


def limited(pair: Pair, most: int | None, peer: bool = False) -> Pair:
    """At most so many files of each class, drawn with seed 0.

    Args:
        pair: of a test set.
        most: files of a class; None keeps all.
        peer: UniversalFakeDetect's rule: if a class has fewer than `most`, both are cut to 100.
    """
    if most is None:
        return pair
    if peer and min(map(len, pair)) < most:
        most = 100
    draw = random.Random(0)
    return Pair(*(sorted(draw.sample(files, most)) if len(files) > most else list(files) for files in pair))
