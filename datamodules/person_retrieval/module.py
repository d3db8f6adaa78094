"""Text-based person retrieval: training pairs, and a gallery and queries to evaluate on."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from datamodules.base import DataModule, Split, TransformImage
from datamodules.loading import EpochSampler, collate_images, hash_seed
from datamodules.person_retrieval.captions import CaptionTokenizer, sentences_of
from datamodules.person_retrieval.layouts import (
    LAYOUTS,
    Name,
    Person,
    numbers,
    read_annotations,
    refuse_missing,
    refuse_overlap,
)
from datamodules.reading import DataError, list_images, read_image
from datamodules.samples.pedestrians import write_pedestrians
from datamodules.sampling import IdentitySampler

CLIP_MEAN_GREY = (156, 147, 132)
"""What IRRA's erasing writes, CLIP's mean triple after normalisation, in 8 bits."""


@dataclass(frozen=True)
class PersonTransforms:
    """Resizing without keeping the aspect, and IRRA's augmentation.

    Args:
        image_size: height and width, pixels.
        augment: flip, pad and crop, and erase.
        erase: probability of erasing.
        erase_value: `mean` is what IRRA writes; `zero` is black.
    """

    image_size: tuple[int, int] = (384, 128)
    augment: bool = True
    erase: float = 0.5
    erase_value: Literal["mean", "zero"] = "mean"

    def train(self) -> Callable[[Image.Image], Tensor]:
        """From a picture to uint8 (3, height, width)."""
        return _Drawn(self) if self.augment else _Resized(self.image_size, hflip=0.5)

    def evaluation(self) -> Callable[[Image.Image], Tensor]:
        """The same without chance."""
        return _Resized(self.image_size)


@dataclass(frozen=True)
class _Resized:
    size: tuple[int, int]
    hflip: float = 0.0

    def __call__(self, picture: Image.Image) -> Tensor:
        picture = picture.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if self.hflip and random.random() < self.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return F.pil_to_tensor(picture)


@dataclass(frozen=True)
class _Drawn:
    options: PersonTransforms

    def __call__(self, picture: Image.Image) -> Tensor:
        options = self.options
        image = F.pad(_Resized(options.image_size, 0.5)(picture), [10])
        image = v2.RandomCrop(options.image_size)(image)
        value = list(CLIP_MEAN_GREY) if options.erase_value == "mean" else [0]
        return v2.RandomErasing(options.erase, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=value)(image)


class PairDataset(Dataset[dict[str, Any]]):
    """One sample a caption, with its image.

    Args:
        root: that paths are relative to.
        persons: records.
        identities: number of each record's identity.
        ids: tokens (captions, length) of all captions, record by record.
    """

    def __init__(self, root: Path, persons: list[Person], identities: list[int], ids: Tensor) -> None:
        self.root, self.persons, self.ids = root, persons, ids
        self.rows = np.repeat(np.arange(len(persons)), [len(person.captions) for person in persons])
        self.identities = np.asarray(identities, np.int64)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = read_image(self.root / self.persons[self.rows[index]].path)
        identity = int(self.identities[index])
        return {"image": picture, "input_ids": self.ids[index], "identity": identity, "index": index}


class GalleryDataset(Dataset[dict[str, Any]]):
    """Each image once.

    Args:
        paths: of the images.
        identities: of the images; None where they are not known.
    """

    def __init__(self, paths: list[Path], identities: list[int] | None) -> None:
        self.paths, self.identities = paths, identities

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {"image": read_image(self.paths[index]), "index": index, "path": str(self.paths[index])}
        return sample if self.identities is None else {**sample, "identity": self.identities[index]}


class QueryDataset(Dataset[dict[str, Any]]):
    """Each caption once.

    Args:
        captions: sentences.
        ids: their tokens.
        identities: of the people described; None where they are not known.
    """

    def __init__(self, captions: list[str], ids: Tensor, identities: list[int] | None) -> None:
        self.captions, self.ids, self.identities = captions, ids, identities

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {"input_ids": self.ids[index], "index": index, "caption": self.captions[index]}
        return sample if self.identities is None else {**sample, "identity": self.identities[index]}


class PersonRetrievalDataModule(DataModule):
    """CUHK-PEDES, ICFG-PEDES, RSTPReid, UFine6926 and UFine3C, all with a licence that forbids to fetch them.

    Training batches have "image" float32 (B, 3, H, W) in [0, 1], "input_ids" int64 (B, context_length),
    "identity" int64 (B,) in 0..C-1 and "index". Evaluation reads two loaders: the gallery ("image",
    "identity", "index", "path"), each image once, and the queries ("input_ids", "identity", "index",
    "caption").

    Args:
        dataset: whose layout it is.
        context_length: tokens of a caption; captions that are longer are cut, counted and announced.
        transforms: size and augmentation of the images.
        sampler: random pairs, or P identities with K captions each in a batch of all ranks together.
        num_instances: K.
        val_source: the layout's own validation split, training identities that are held out, or the test
            split (which chooses a checkpoint by what it is tested on). Without a validation split `val`
            holds training identities out.
        val_id_fraction: of the training identities that are held out.
        allow_overlap: accept identities that are trained and evaluated on.
        gallery: folder of pictures to predict on; null is the test gallery.
        query: a sentence to predict with.
        queries: file with a sentence a line; null with no ``query`` is the test queries.
        sample_identities: that ``sample: true`` draws; a quarter of them to test on.
        options: of ``DataModule``.
    """

    layout: ClassVar[str] = "; ".join(
        f"{name}: {' or '.join(each.annotations)}, images in {each.images or 'images'}/"
        for name, each in LAYOUTS.items()
    )

    def __init__(
        self,
        *,
        dataset: Name = "ufine6926",
        context_length: int = 168,
        transforms: PersonTransforms = PersonTransforms(),
        sampler: Literal["random", "identity"] = "random",
        num_instances: int = 4,
        val_source: Literal["val", "train_holdout", "test"] = "val",
        val_id_fraction: float = 0.05,
        allow_overlap: bool = False,
        gallery: Path | None = None,
        query: str | None = None,
        queries: Path | None = None,
        sample_identities: int = 40,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if dataset not in LAYOUTS:
            raise ValueError(f"dataset={dataset}: it must be one of {', '.join(LAYOUTS)}.")
        if not 0 < val_id_fraction < 1:
            raise ValueError(f"val_id_fraction={val_id_fraction}: it must be in (0, 1).")
        if query is not None and queries is not None:
            raise ValueError("query and queries exclude each other: give a sentence, or a file of sentences.")
        self.dataset = dataset
        self.context_length = context_length
        self.tokenize = CaptionTokenizer(context_length)
        self.transforms = transforms
        self.order = sampler
        self.num_instances = num_instances
        self.val_source = val_source
        self.val_id_fraction = val_id_fraction
        self.allow_overlap = allow_overlap
        self.gallery, self.query, self.queries = gallery, query, queries
        self.sample_identities = sample_identities
        self._num_classes: int | None = None

    @property
    def num_classes(self) -> int:
        """Training identities.

        Raises:
            MisconfigurationException: nothing was set up for training.
        """
        if self._num_classes is None:
            raise MisconfigurationException("PersonRetrievalDataModule: no training split was read yet.")
        return self._num_classes

    def write_sample(self) -> None:
        """Draw pedestrians in UFine6926's format."""
        if self.dataset != "ufine6926":
            raise MisconfigurationException("sample: true is written as dataset: ufine6926; set that.")
        write_pedestrians(self.root, self.sample_identities)

    def setup(self, stage: str) -> None:
        """Read annotations, check them and tokenise the captions.

        Raises:
            ValueError: training is asked of UFine3C, which is a test set.
            DataError: the data are not as the layout says.
        """
        if stage == "fit" and self.dataset == "ufine3c":
            raise ValueError("dataset: ufine3c is for tests only: train on another data set.")
        if stage == "predict" and self.gallery is not None and (self.query or self.queries):
            return self._set_up_own()
        records = read_annotations(self.root, self.dataset)
        splits = {split: found for split, found in records.items() if found}
        train, val = splits.get("train", []), splits.get("val")
        if not self.allow_overlap:
            for split in ("val", "test"):
                refuse_overlap(split, splits.get(split, []), train, self.root)
        if stage in ("fit", "validate"):
            train, val = self._validation(train, val, splits.get("test", []))
            refuse_missing(self.root, val)
            self._evaluated("val", val)
        if stage == "fit":
            if not train:
                raise ValueError(f"{self.root}: the train split of {self.dataset} is empty.")
            refuse_missing(self.root, train)
            self._trained(train)
        if stage in ("test", "predict"):
            test = splits.get("test", [])
            refuse_missing(self.root, test)
            self._evaluated("test" if stage == "test" else "predict", test)
        if stage == "predict":
            self._set_up_own()
        return None

    def _validation(
        self, train: list[Person], val: list[Person] | None, test: list[Person]
    ) -> tuple[list[Person], list[Person]]:
        if self.val_source == "test":
            rank_zero_warn(
                "val_source: test: a checkpoint that is chosen by this was chosen on the test set."
            )
            return train, test
        if self.val_source == "val" and val:
            return train, val
        limit = self.val_id_fraction * 2**64
        held = {p.identity for p in train if hash_seed(self.run_seed, p.identity) < limit}
        held = held or {p.identity for p in train[:1]}
        return (
            [person for person in train if person.identity not in held],
            [person for person in train if person.identity in held],
        )

    def _tokens(self, split: str, captions: list[str]) -> Tensor:
        ids, cut = self.tokenize(captions)
        if cut:
            rank_zero_warn(
                f"{self.dataset}, {split}: {cut} of {len(captions)} captions are longer than context_length: "
                f"{self.context_length} tokens and were cut."
            )
        return ids

    def _trained(self, persons: list[Person]) -> None:
        names = sorted({person.identity for person in persons})
        numbered = {identity: number for number, identity in enumerate(names)}
        ids = self._tokens("train", [caption for person in persons for caption in person.captions])
        identities = [numbered[person.identity] for person in persons]
        if len(names) < 2:
            raise DataError(f"{self.root}: the training data have one identity, expected at least two.")
        self._num_classes = len(names)
        self.datasets["train"] = PairDataset(self.root, persons, identities, ids)
        self._announce("train", persons)

    def _evaluated(self, split: str, persons: list[Person]) -> None:
        captions = [caption for person in persons for caption in person.captions]
        described = [person.identity for person in persons for _ in person.captions]
        self.datasets[f"{split}_gallery"] = GalleryDataset(
            [self.root / person.path for person in persons], [person.identity for person in persons]
        )
        self.datasets[f"{split}_queries"] = QueryDataset(captions, self._tokens(split, captions), described)
        self._announce(split, persons)

    def _announce(self, split: str, persons: list[Person]) -> None:
        found = numbers(persons)
        expected = LAYOUTS[self.dataset].counts.get(split)
        known = expected is None or expected == found
        note = "" if known else f" (published: {', '.join(map(str, expected or ()))})"
        rank_zero_info(
            f"{self.dataset}, {split}: {found[0]} identities, {found[1]} images, {found[2]} captions{note}."
        )

    def _set_up_own(self) -> None:
        """A folder of one's own, or sentences of one's own, or both."""
        if self.gallery is not None:
            listing = list_images(self.gallery)
            if not listing.names:
                raise FileNotFoundError(
                    f"gallery: there are no images in {self.gallery}{listing.left_out()}."
                )
            paths = [self.gallery / name for name in listing.names]
            self.datasets["predict_gallery"] = GalleryDataset(paths, None)
            self.announce("predict", f"{len(paths)} images", self.gallery, listing)
        captions = sentences_of(self.query, self.queries)
        if captions:
            self.datasets["predict_queries"] = QueryDataset(captions, self._tokens("queries", captions), None)

    def parts(self, split: Split) -> Sequence[str]:
        """Gallery and queries, but for training."""
        return (split,) if split == "train" else (f"{split}_gallery", f"{split}_queries")

    def transform(self, split: Split) -> Callable[[Any], Any] | None:
        """Of the images; captions are tokenised already."""
        chosen = self.transforms.train() if split == "train" else self.transforms.evaluation()
        return WhereImage(chosen)

    def collation(self) -> Callable[[list[Any]], Any]:
        """With images, or without."""
        return collate_sides

    def sampler(self, dataset: Any, split: Split) -> EpochSampler:
        """Random pairs, or P x K.

        Raises:
            ValueError: the batch is no multiple of K.
        """
        if split != "train" or self.order == "random":
            return super().sampler(dataset, split)
        rank, world = self._ranks()
        batch = self.batch_size * world
        if batch % self.num_instances:
            raise ValueError(
                f"batch_size: {self.batch_size} on {world} ranks is no multiple of num_instances: "
                f"{self.num_instances}."
            )
        pairs = self.datasets["train"]
        assert isinstance(pairs, PairDataset)
        return IdentitySampler(
            pairs.identities.tolist(),
            batch // self.num_instances,
            self.num_instances,
            seed=self.run_seed,
            rank=rank,
            num_replicas=world,
        )


@dataclass(frozen=True)
class WhereImage:
    """Applies an image transform to samples that have a picture.

    Args:
        transform: of the picture.
    """

    transform: Callable[[Any], Any]

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample, with the new image where it had one."""
        return TransformImage(self.transform)(sample) if "image" in sample else sample


def collate_sides(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of pictures, or of queries, which have none."""
    return collate_images(samples) if "image" in samples[0] else default_collate(samples)
