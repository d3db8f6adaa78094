"""Text-based person retrieval: training pairs, and a gallery and queries to evaluate on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base import DataModule, Split, WhereImage
from datamodules.loading import EpochSampler, collate_sides, hash_seed
from datamodules.person_retrieval.captions import CaptionTokenizer, sentences_of
from datamodules.person_retrieval.datasets import GalleryDataset, PairDataset, QueryDataset
from datamodules.person_retrieval.gallery import SHARD_BYTES, IndexedGallery, open_index
from datamodules.person_retrieval.layouts import (
    LAYOUTS,
    Name,
    Person,
    annotation_file,
    numbers,
    read_annotations,
    refuse_missing,
    refuse_overlap,
)
from datamodules.person_retrieval.transforms import PersonTransforms
from datamodules.reading import DataError, list_images
from datamodules.samples.pedestrians import write_pedestrians
from datamodules.sampling import IdentitySampler


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
        index: folder of the gallery's vectors: computed once, by the weights that predict, and read from
            there afterwards; null computes them in every ``predict``.
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
        index: Path | None = None,
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
        self.gallery, self.index, self.query, self.queries = gallery, index, query, queries
        self._indexed: IndexedGallery | None = None
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
        records, file = read_annotations(self.root, self.dataset), annotation_file(self.root, self.dataset)
        splits = {split: found for split, found in records.items() if found}
        train, val = splits.get("train", []), splits.get("val")
        if not self.allow_overlap:
            for split in ("val", "test"):
                refuse_overlap(split, splits.get(split, []), train, file)
        if stage in ("fit", "validate"):
            train, val = self._validation(train, val, splits.get("test", []))
            refuse_missing(self.root, val, file)
            self._evaluated("val", val)
        if stage == "fit":
            if not train:
                raise ValueError(f"{self.root}: the train split of {self.dataset} is empty.")
            refuse_missing(self.root, train, file)
            self._trained(train)
        if stage in ("test", "predict"):
            test = splits.get("test", [])
            refuse_missing(self.root, test, file)
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

    def predict_dataloader(self) -> Any:
        """Gallery and queries; of an indexed gallery the queries alone.

        Raises:
            MisconfigurationException: the module cannot make an index, or other weights made this one.
        """
        if self.index is None:
            return super().predict_dataloader()
        module = None if self.trainer is None else self.trainer.lightning_module
        encoder = getattr(module, "gallery_encoder", None)
        if encoder is None:
            raise MisconfigurationException(
                f"index: {type(module).__name__} has no gallery_encoder to make it by; set index: null."
            )
        cache = self.feature_cache(self.index, encoder, shard_bytes=SHARD_BYTES)
        gallery = self.datasets["predict_gallery"]
        assert isinstance(gallery, GalleryDataset)
        self._indexed = open_index(self.index, cache, gallery, self.transforms)
        return self.loader("predict", "predict_queries")

    def indexed_gallery(self) -> IndexedGallery | None:
        """What is searched in a prediction, where it is indexed."""
        return self._indexed

    def parts(self, split: Split) -> Sequence[str]:
        """Gallery and queries, but for training, and for predictions on an indexed gallery."""
        if split == "predict" and self.index is not None:
            return ("predict_queries",)
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
            ValueError: the batch is no multiple of K, or has one identity.
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
        if batch == self.num_instances:
            raise ValueError(
                f"batch_size: {self.batch_size} on {world} ranks has one identity with num_instances: "
                f"{self.num_instances}, expected at least two: no other sentence would be a negative."
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
