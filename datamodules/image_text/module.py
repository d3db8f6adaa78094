"""Pictures with captions to train on, classes by name and retrieval to evaluate on, folders to predict on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split, WhereImage
from datamodules.image_text.annotations import read_coco, read_csv, read_karpathy, with_captions
from datamodules.image_text.evaluation import (
    Prompts,
    RetrievalSet,
    Templates,
    ZeroShotSet,
    prompts_of,
    read_retrieval,
    read_zero_shot,
)
from datamodules.image_text.pairs import (
    MEMBERS,
    JsonLines,
    ListedPairs,
    Records,
    ShardPairs,
    TextPairs,
    Which,
    shard_files,
    too_few_shards,
    usable,
)
from datamodules.loading import EpochSampler, collate_sides
from datamodules.person_retrieval.captions import CaptionTokenizer, sentences_of
from datamodules.person_retrieval.datasets import GalleryDataset, QueryDataset
from datamodules.reading import SkipCounter, list_images
from datamodules.samples.scenes import write_scenes
from datamodules.samples.writing import is_sample
from datamodules.streaming import ShardSampler, TarShards
from datamodules.transforms import ImageTransforms

Format = Literal["webdataset", "csv", "jsonl", "karpathy", "coco"]
VOCABULARY = 49408


class ImageTextDataModule(DataModule):
    """Image-text pairs in the layouts of open_clip, img2dataset, DeCLIP, Karpathy and COCO.

    Training batches have "image" float32 (B, 3, H, W) in [0, 1], "input_ids" int64 (B, context_length),
    CLIP's tokens with zeros behind the end mark, "index" and "path". Evaluation reads a loader for each
    zero-shot set ("image", "label", "index") and two for each retrieval set: the gallery ("image",
    "identity", "index", "path") and the queries ("input_ids", "identity", "index", "caption").

    Shards are read by index: every rank gets equally many whole batches, an epoch is resumed anywhere, and no
    reader is without data. Samples without caption or picture are left out and counted.

    Args:
        format: of the training data. `webdataset`: tars with `KEY.jpg` (png, webp) and `KEY.txt`; `csv`: a
            table with a header; `jsonl`: an object a line; `karpathy`: his JSON or a flat list; `coco`.
        train: the tars (`{00000..00331}.tar`, a folder, a glob, several joined by `::`), or the file.
        images: folder that a list's paths are relative to, under root.
        splits: of Karpathy's JSON to train on.
        image_key: column or key of the picture's path.
        caption_key: of the caption; a list in `jsonl` is one of captions.
        separator: of the table.
        captions: of a picture with several, the first in every epoch or a random one.
        context_length: tokens of a caption; longer ones are cut, counted and announced.
        transforms: crops and augmentation.
        window: tars whose samples are shuffled among each other.
        max_skip_fraction: share of unreadable samples beyond which `on_error: skip` gives up.
        zero_shot: sets to evaluate on.
        retrieval: sets to evaluate on.
        gallery: folder of pictures to predict on; None takes the first retrieval set.
        labels: names of classes: predict which of them a picture of the gallery is.
        label_templates: sentences for these names.
        query: a sentence to find pictures for.
        queries: file with a sentence a line.
        sample_size: training scenes that `sample: true` draws.
        options: of `DataModule`.
    """

    layout: ClassVar[str] = (
        "what train, zero_shot and retrieval name, such as train/00000.tar with KEY.jpg, KEY.txt"
    )

    def __init__(
        self,
        *,
        format: Format = "webdataset",
        train: str = "train",
        images: Path = Path(),
        splits: tuple[str, ...] = ("train",),
        image_key: str = "filepath",
        caption_key: str = "title",
        separator: str = "\t",
        captions: Which = "first",
        context_length: int = 77,
        transforms: ImageTransforms = ImageTransforms(),
        window: int = 16,
        max_skip_fraction: float = 0.1,
        zero_shot: list[ZeroShotSet] | None = None,
        retrieval: list[RetrievalSet] | None = None,
        gallery: Path | None = None,
        labels: list[str] | None = None,
        label_templates: Templates = "simple",
        query: str | None = None,
        queries: Path | None = None,
        sample_size: int = 600,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if format not in ("webdataset", "csv", "jsonl", "karpathy", "coco"):
            raise ValueError(f"format={format}: it must be webdataset, csv, jsonl, karpathy or coco.")
        if query is not None and queries is not None:
            raise ValueError("query and queries exclude each other: give a sentence, or a file of sentences.")
        if labels is not None and (query is not None or queries is not None):
            raise ValueError("labels and query exclude each other: name classes, or look for a sentence.")
        if not 0 <= max_skip_fraction <= 1:
            raise ValueError(f"max_skip_fraction={max_skip_fraction}: it must be in [0, 1].")
        self.format, self.train_source, self.images, self.splits = format, train, images, splits
        self.keys = (image_key, caption_key)
        self.separator, self.captions, self.window = separator, captions, window
        self.context_length, self.transforms = context_length, transforms
        self.max_skip_fraction = max_skip_fraction
        self.zero_shot, self.retrieval = zero_shot or [], retrieval or []
        names = [*(each.name for each in self.zero_shot), *(each.name for each in self.retrieval)]
        if len(set(names)) < len(names) or any("/" in name for name in names):
            raise ValueError(
                f"zero_shot and retrieval need different names without '/', not {', '.join(names)}."
            )
        self.gallery, self.labels, self.label_templates = gallery, labels, label_templates
        self.query, self.queries = query, queries
        self.sample_size = sample_size
        self.tokenize = CaptionTokenizer(context_length)
        self.prompts: dict[str, Prompts] = {}

    @property
    def image_size(self) -> int:
        """Side of the square images that the network sees, pixels."""
        return self.transforms.image_size

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that are predicted.

        Raises:
            MisconfigurationException: none are.
        """
        if self.labels is None:
            raise MisconfigurationException("ImageTextDataModule has no classes: give labels.")
        return self.labels

    @property
    def synthetic(self) -> bool:
        """Whether the data were drawn by `sample: true`."""
        return is_sample(self.root)

    def write_sample(self) -> None:
        """Draw scenes with captions, in img2dataset's and Karpathy's formats."""
        write_scenes(self.root, self.sample_size)

    def prepare_data(self) -> None:
        """Fill `root`, and read the headers of the tars once for all ranks of a node."""
        super().prepare_data()
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        if fits and self.format == "webdataset" and self.root.is_dir():
            TarShards(shard_files(self.train_source, self.root), MEMBERS)

    def setup(self, stage: str) -> None:
        """Read what a stage needs.

        Raises:
            DataError: the data are not as the layout says.
            FileNotFoundError: a file is not there.
            MisconfigurationException: the model was made for another tokenizer.
        """
        self._check_vocabulary()
        if self.synthetic:
            rank_zero_warn(f"ImageTextDataModule: {self.root} is synthetic: scenes drawn by sample: true.")
        if stage == "fit":
            self.datasets["train"] = self._training()
        splits: dict[str, Split] = {"fit": "val", "validate": "val", "test": "test", "predict": "predict"}
        split = splits[stage]
        if split == "predict":
            self._set_up_prediction()
        else:
            self._set_up_evaluation(split)

    def _check_vocabulary(self) -> None:
        module = None if self.trainer is None else self.trainer.lightning_module
        size: Any = getattr(module, "vocabulary_size", None)
        if size is not None and size != VOCABULARY:
            raise MisconfigurationException(
                f"ImageTextDataModule: captions are CLIP's byte pairs, {VOCABULARY} tokens, and the model's "
                f"vocabulary has {size}: the tokenizer is not the model's."
            )

    # training

    def _training(self) -> TextPairs:
        options: dict[str, Any] = {
            "tokenize": self.tokenize,
            "which": self.captions,
            "num_workers": self.num_workers,
        }
        if self.format == "webdataset":
            self.require(self.root)
            shards = ShardPairs(shard_files(self.train_source, self.root), **options)
            too_few_shards(len(shards.lengths), self._ranks()[1], self.num_workers)
            left = f", {shards.shards.incomplete} samples without picture or caption left out"
            note = left * bool(shards.shards.incomplete)
            rank_zero_info(f"train: {len(shards)} pairs in {len(shards.lengths)} shards{note}.")
            return usable(shards, self.train_source)
        file = self.root / self.train_source
        self.require(file)
        folder, skip = self.root / self.images, self.on_error == "skip"
        if self.format == "jsonl":
            listed: Any = JsonLines(file, *self.keys, folder, skip)
            empty = listed.empty
        else:
            records, empty = with_captions(self._records(file), skip)
            listed = Records(records, folder)
        note = f", {empty} with an empty caption left out" * bool(empty)
        rank_zero_info(f"train: {len(listed)} pictures with captions in {file}{note}.")
        return usable(ListedPairs(listed, **options), str(file))

    def _records(self, file: Path) -> Any:
        if self.format == "csv":
            return read_csv(file, *self.keys, self.separator)
        return read_coco(file) if self.format == "coco" else read_karpathy(file, self.splits)

    def sampler(self, dataset: Any, split: Split) -> EpochSampler:
        """Training goes through a few tars at a time, so that they are read in long runs."""
        shards = self.datasets.get("train")
        if split != "train" or not isinstance(shards, ShardPairs) or len(shards.lengths) == 1:
            return super().sampler(dataset, split)
        rank, world = self._ranks()
        tail: Any = "drop" if self.drop_last else "repeat"
        place: dict[str, Any] = {"rank": rank, "num_replicas": world, "repeats": self.repeats}
        return ShardSampler(shards.lengths, self.window, seed=self.run_seed, tail=tail, **place)

    def epoch_end(self, part: str, counter: SkipCounter | None) -> Callable[[], None] | None:
        """Say how much could not be read, and how many captions were cut."""
        report, data = super().epoch_end(part, counter), self.datasets.get(part)
        if not isinstance(data, TextPairs):
            return report
        cut = partial(data.cut.report, f"{type(self).__name__}, {part}")
        return cut if report is None else partial(_both, report, cut)

    # evaluation

    def _set_up_evaluation(self, split: Split) -> None:
        for zero in self.zero_shot:
            found, prompts, cut = read_zero_shot(zero, self.root, self.download, self.tokenize)
            self.datasets[f"{split}_{zero.name}"], self.prompts[f"{split}_{zero.name}"] = found, prompts
            self._announce_set(
                f"{split}, {zero.name}", f"{_length(found)} pictures", len(prompts.class_names), cut
            )
        for each in self.retrieval:
            both = read_retrieval(each, self.root, self.tokenize)
            self.datasets[f"{split}_{each.name}_gallery"] = both.gallery
            self.datasets[f"{split}_{each.name}_queries"] = both.queries
            what = f"{len(both.gallery)} pictures with {len(both.queries)} captions"
            self._announce_set(f"{split}, {each.name}", what, 0, both.cut)

    def _announce_set(self, part: str, what: str, classes: int, cut: int) -> None:
        named = f" of {classes} classes" * bool(classes)
        long = f"; {cut} sentences are longer than context_length: {self.context_length} and were cut" * bool(
            cut
        )
        rank_zero_info(f"{part}: {what}{named}{long}.")

    def _set_up_prediction(self) -> None:
        captions = sentences_of(self.query, self.queries)
        if self.gallery is not None:
            listing = list_images(self.gallery)
            if not listing.names:
                raise FileNotFoundError(
                    f"gallery: there are no images in {self.gallery}{listing.left_out()}."
                )
            pictures = GalleryDataset([self.gallery / name for name in listing.names], None)
            self.announce("predict", f"{len(pictures)} images", self.gallery, listing)
        elif not self.retrieval:
            raise MisconfigurationException(
                "ImageTextDataModule: nothing says what to predict on: give gallery, a folder of "
                "pictures, or a retrieval set."
            )
        else:
            both = read_retrieval(self.retrieval[0], self.root, self.tokenize)
            pictures = both.gallery
            self.datasets["predict_queries"] = both.queries
        if self.labels is not None:
            self.datasets["predict"] = pictures
            prompts, _ = prompts_of(self.labels, self.label_templates, "label_templates", self.tokenize)
            self.prompts["predict"] = prompts
            return
        self.datasets["predict_gallery"] = pictures
        if captions:
            self.datasets["predict_queries"] = QueryDataset(captions, self.tokenize(captions)[0], None)
        elif self.gallery is not None:
            raise MisconfigurationException(
                "ImageTextDataModule: give query or queries, sentences to find pictures for, or labels, "
                "names of classes."
            )

    def parts(self, split: Split) -> Sequence[str]:
        """Each zero-shot set, then gallery and queries of each retrieval set."""
        if split == "train":
            return (split,)
        if split == "predict":
            return ("predict",) if self.labels is not None else ("predict_gallery", "predict_queries")
        sides = [f"{split}_{each.name}_{side}" for each in self.retrieval for side in ("gallery", "queries")]
        return [*(f"{split}_{each.name}" for each in self.zero_shot), *sides]

    def loaders(self, split: Split) -> Any:
        """A loader for each part; none where nothing is evaluated in training."""
        return super().loaders(split) if self.parts(split) else []

    def transform(self, split: Split) -> Callable[[Any], Any] | None:
        """Of the pictures; captions are tokens already."""
        chosen = self.transforms.train() if split == "train" else self.transforms.evaluation()
        return WhereImage(chosen)

    def collation(self) -> Callable[[list[Any]], Any]:
        """With images, or without."""
        return collate_sides


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
