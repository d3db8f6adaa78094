"""Which files are real and which generated, in ForenSynths / UniversalFakeDetect and in GenImage."""

import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules.reading import Listing, list_folders, list_images

Layout = Literal["universal", "genimage"]

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
    """Sets by generator: to train on, to validate on (may be empty), to test on; and what was left out."""

    train: dict[str, Pair]
    val: dict[str, Pair]
    test: dict[str, Pair]
    left_out: Listing


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
        MisconfigurationException: a class is unknown, or the layout has none.
    """
    files = _Files(root)
    if layout == "universal":
        return Manifest(*_universal(files, classes), Listing([], files.hidden, files.other))
    if classes is not None:
        raise MisconfigurationException(
            f"classes: {', '.join(classes)}: the layout genimage has no class folders; set classes: null."
        )
    return Manifest(*_genimage(files), Listing([], files.hidden, files.other))


class _Files:
    """Lists images of a data set, and counts what is left out.

    Args:
        root: that names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hidden = self.other = 0

    def below(self, folder: Path) -> list[str]:
        """Sorted names, relative to the folder, of the images in and below it; none if there is no folder."""
        if not folder.is_dir():
            return []
        listing = list_images(folder)
        self.hidden, self.other = self.hidden + listing.hidden, self.other + listing.other
        return listing.names

    def within(self, folder: Path) -> list[str]:
        """The same, relative to the root."""
        return [f"{folder.relative_to(self.root)}/{name}" for name in self.below(folder)]


def _subfolders(folder: Path) -> list[Path]:
    return [folder / name for name in list_folders(folder).names] if folder.is_dir() else []


# ForenSynths and UniversalFakeDetect: a file is real iff a folder above it is 0_real, fake iff one is 1_fake

Splits = tuple[dict[str, Pair], dict[str, Pair], dict[str, Pair]]


def _universal(files: _Files, classes: Sequence[str] | None) -> Splits:
    root = files.root
    diffusion = next(
        (path for path in (root / "diffusion_datasets", root / "test/diffusion_datasets") if path.is_dir()),
        None,
    )
    train, val = (_by_generator(root / split, files, classes) for split in ("train", "val"))
    test = {
        folder.name: _pair(_marked(folder, files), folder)
        for folder in _subfolders(root / "test")
        if folder.name != "diffusion_datasets"
    }
    return train, val, test if diffusion is None else test | _diffusion(diffusion, files)


class _Marked(NamedTuple):
    """A file below a `0_real` or `1_fake`, and the folders between the set's own and that."""

    name: str
    mark: str
    folders: frozenset[str]


def _by_generator(folder: Path, files: _Files, classes: Sequence[str] | None) -> dict[str, Pair]:
    """Training folders: `<generator>/...` as in UniversalFakeDetect, or the classes of ProGAN as in
    ForenSynths.
    """
    names = {path.name for path in _subfolders(folder)}
    if names and names <= LSUN_CLASSES:
        places = {"progan": folder}
    else:
        places = {name: folder / name for name in sorted(names)}
    marked = {name: _marked(place, files) for name, place in places.items()}
    if classes is not None and marked:
        there = frozenset[str]().union(*(file.folders for each in marked.values() for file in each))
        unknown = sorted(set(classes) - there)
        if unknown:
            raise MisconfigurationException(
                f"classes: {folder} has no class folder {', '.join(unknown)}; it has "
                f"{', '.join(sorted(there)) or 'none'}."
            )
        wanted = set(classes)
        marked = {name: [file for file in each if wanted & file.folders] for name, each in marked.items()}
    return {name: _pair(each, places[name]) for name, each in marked.items()}


def _marked(folder: Path, files: _Files) -> list[_Marked]:
    found = []
    start = folder.relative_to(files.root)
    for name in files.below(folder):
        *folders, _ = name.split("/")
        mark = next((place for place in ("0_real", "1_fake") if place in folders), None)
        if mark is None:
            files.other += 1
        else:
            found.append(_Marked(f"{start}/{name}", mark, frozenset(folders[: folders.index(mark)])))
    return found


def _pair(marked: Sequence[_Marked], folder: Path) -> Pair:
    real, fake = ([file.name for file in marked if file.mark == mark] for mark in ("0_real", "1_fake"))
    return _checked(Pair(real, fake), folder, "0_real", "1_fake")


def _diffusion(folder: Path, files: _Files) -> dict[str, Pair]:
    sources = {name: files.within(folder / name / "0_real") for name in ("imagenet", "laion")}
    found = {}
    for place in _subfolders(folder):
        if (place / "1_fake").is_dir():
            source = REALS_OF.get(place.name, "laion")
            pair = Pair(sources[source], files.within(place / "1_fake"))
            found[place.name] = _checked(pair, place, f"../{source}/0_real", "1_fake")
    return found


# GenImage: <generator>/[<archive>/]{train,val}/{ai,nature}; by name, as the sorted folders would swap labels


def _genimage(files: _Files) -> Splits:
    splits: dict[str, dict[str, Pair]] = {"train": {}, "val": {}}
    for generator in _subfolders(files.root):
        for split, found in splits.items():
            places = [generator / split, *(archive / split for archive in _subfolders(generator))]
            existing = [place for place in places if place.is_dir()]
            different = {
                place.resolve(): place for place in reversed(existing)
            }.values()  # two links, one archive
            if existing:
                real, fake = (
                    sorted(name for place in different for name in files.within(place / kind))
                    for kind in ("nature", "ai")
                )
                found[generator.name] = _checked(Pair(real, fake), existing[0], "nature", "ai")
    return splits["train"], {}, splits["val"]


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
