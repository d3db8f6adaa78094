"""SA1BDataModule: pictures with many masks and no classes, from the tars as published or extracted."""

import zlib
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Subset

from datamodules.base import DataModule, Split
from datamodules.features import SHARD_BYTES, FeatureStore
from datamodules.loading import EpochSampler, ResumableLoader
from datamodules.sa1b.cache import open_embeddings
from datamodules.sa1b.dataset import (
    EvaluationFrame,
    PictureDataset,
    PredictionFrame,
    Sa1bDataset,
    TeacherFrame,
    TrainingFrame,
)
from datamodules.sa1b.frame import collate_frames
from datamodules.sa1b.pairs import Source, choose, open_pairs
from datamodules.sa1b.prompts import read_prompts
from datamodules.samples.sa1b import write_sa1b
from datamodules.streaming import ShardSampler


class SA1BDataModule(DataModule):
    """SA-1B: `sa_<id>.jpg` and `sa_<id>.json`, in `sa_000000.tar`, ... as published, or extracted.

    Batches are dicts: "image" float32 (B, 3, S, S) in [0, 1], the longer side resized to S and the rest
    black; "size" and "orig_size" int64 (B, 2), height and width in the batch and on disk; "index"; "id" and
    "path", lists. Training adds "masks" bool (N, S/4, S/4), the targets of all pictures in the batch, "owner"
    int64 (N,), the place of each one's picture, and with `cache` "embedding" float16 (C, 256, S/16, S/16)
    of the pictures for which "cached" bool (B,) is true. Evaluation adds "truth", bool (n, height, width) of
    each picture, and "picture", which prediction has, too.

    There is no published split: what is validated on is chosen by a hash of the id. Pictures without a JSON,
    and the reverse, are counted and left out; one without masks adds nothing to a loss.

    Args:
        image_size: S, a multiple of 16.
        masks_per_image: masks drawn for each picture of a training batch.
        source: read `tars` or a `folder`; `auto` takes what is there.
        ids: text file of the ids to use, one a line; null is all.
        fraction: of the pictures, the first ones in order (0.01 of SA-1B is 10 of the 1000 tars).
        val_fraction: of these, kept for validation and test, at least one; 0 keeps none.
        val_images: most pictures of validation and test; null is all.
        val_masks: most masks of each picture there.
        window: tars whose pictures are shuffled among each other.
        cache: folder of the teacher's embeddings, which are computed by `fit` as far as they are not there;
            null computes them in each step.
        cache_images: how many training pictures have their embedding there, the first ones; null is all. One
            takes 2 MiB at 1024 pixels.
        cache_shard_bytes: most bytes of a file of the cache, which is what an interruption loses of it.
        predict_folder: pictures to predict on; null is the validation pictures.
        prompts: JSON of the prompts to predict with, see `read_prompts`; null predicts everything.
        batch_size: pictures of a training batch, on each device.
        eval_batch_size: of a batch elsewhere.
        sample_size: number of pictures that ``sample: true`` writes.
        sample_image_size: their shorter side, pixels.
        sample_tars: tars that they are in; 0 writes pairs of files.
        options: of ``DataModule``.
    """

    layout: ClassVar[str] = "sa_000000.tar, ..., or sa_<id>.jpg and sa_<id>.json, flat or in sub-folders"

    def __init__(
        self,
        *,
        image_size: int = 1024,
        masks_per_image: int = 64,
        source: Source = "auto",
        ids: Path | None = None,
        fraction: float = 1.0,
        val_fraction: float = 0.002,
        val_images: int | None = None,
        val_masks: int | None = 16,
        window: int = 4,
        cache: Path | None = None,
        cache_images: int | None = None,
        cache_shard_bytes: int = SHARD_BYTES,
        predict_folder: Path | None = None,
        prompts: Path | None = None,
        batch_size: int = 1,
        eval_batch_size: int | None = 1,
        sample_size: int = 64,
        sample_image_size: int = 96,
        sample_tars: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **options)
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size: a multiple of 16 is needed, not {image_size}.")
        if masks_per_image < 1:
            raise ValueError(f"masks_per_image: at least 1 is needed, not {masks_per_image}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is at least 0 and below 1, not {val_fraction}.")
        self.image_size = image_size
        self.masks_per_image = masks_per_image
        self.source: Source = source
        self.ids = ids
        self.fraction = fraction
        self.val_fraction = val_fraction
        self.val_images = val_images
        self.val_masks = val_masks
        self.window = window
        self.cache = None if cache is None else Path(cache)
        self.cache_images = cache_images
        self.cache_shard_bytes = cache_shard_bytes
        self.predict_folder = predict_folder
        self.prompts = prompts
        self.sample_size = sample_size
        self.sample_image_size = sample_image_size
        self.sample_tars = sample_tars

    def write_sample(self) -> None:
        """Writes drawn scenes."""
        write_sa1b(self.root, self.sample_size, self.sample_image_size, self.sample_tars)

    def setup(self, stage: str) -> None:
        """Lists the pictures of a stage.

        Raises:
            FileNotFoundError: there is no such folder or file.
            DataError: nothing is there, or a tar is damaged.
        """
        if stage == "predict" and self.predict_folder is not None:
            pictures = PictureDataset(self.predict_folder)
            self.announce("predict", f"{len(pictures)} pictures", self.predict_folder, pictures.listing)
            self.datasets["predict"] = pictures
            return
        self.require(self.root)
        pairs = open_pairs(self.root, self.source)
        if pairs.incomplete:
            rank_zero_warn(
                f"SA1BDataModule: {pairs.incomplete} files of {self.root} are a picture without a JSON or "
                "the reverse, and are left out."
            )
        rows = choose(pairs.keys, self.ids, self.fraction, self.root)
        hashes = np.array([_hash(pairs.keys[row]) for row in rows])
        # at least one, unless none is wanted
        validates = hashes < (max(self.val_fraction, hashes.min() + 1e-12) if self.val_fraction else 0)
        train = Sa1bDataset(pairs, rows[~validates])
        val = Sa1bDataset(pairs, rows[validates][: self.val_images])
        said = f"{len(train)} pictures to train on and {len(val)} to validate on"
        self.announce("train" if stage == "fit" else "val", said, self.root, pairs.left_out)
        if stage == "fit":
            self.datasets["train"] = train
        self.datasets[{"test": "test", "predict": "predict"}.get(stage, "val")] = val

    # the teacher's embeddings

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; first completes the cache of embeddings. A collective."""
        dataset = self._dataset("train")
        if self.cache is not None and isinstance(dataset, Sa1bDataset) and dataset.store is None:
            dataset.store = self._embeddings(self.cache, dataset)
        return self.loader("train")

    def _embeddings(self, cache: Path, dataset: Sa1bDataset) -> FeatureStore:
        module = None if self.trainer is None else self.trainer.lightning_module
        encoder = getattr(module, "encoder", None)
        if encoder is None:
            raise MisconfigurationException(
                f"cache: {type(module).__name__} has no teacher whose embeddings could be cached; add the "
                "callback SAMTeacher, or set cache: null."
            )
        count = len(dataset) if self.cache_images is None else min(self.cache_images, len(dataset))
        side = self.image_size // 16
        shape = (encoder.width, side, side)
        features = self.feature_cache(
            cache, encoder, shape=shape, dtype="float16", shard_bytes=self.cache_shard_bytes
        )
        rank_zero_info(
            f"SA1BDataModule: embeddings of {count} of {len(dataset)} training pictures are kept in {cache}, "
            f"{count * encoder.width * side * side * 2 / 1e9:.3g} GB."
        )
        chosen = Subset(dataset, range(count))
        return open_embeddings(features, chosen, dataset.identity(count), TeacherFrame(self.image_size))

    # batches

    def sampler(self, dataset: Sized, split: Split) -> EpochSampler:
        """Training goes through a few tars at a time, so that they are read in long runs."""
        train = self.datasets.get("train")
        if split != "train" or not isinstance(train, Sa1bDataset) or len(train.lengths) == 1:
            return super().sampler(dataset, split)
        rank, world = self._ranks()
        tail: Any = "drop" if self.drop_last else "repeat"
        return ShardSampler(
            train.lengths,
            self.window,
            seed=self.run_seed,
            tail=tail,
            repeats=self.repeats,
            rank=rank,
            num_replicas=world,
        )

    def transform(self, split: Split) -> Callable[[Any], Any]:
        """The frame of a split."""
        if split == "train":
            return TrainingFrame(self.image_size, self.masks_per_image)
        if split == "predict":
            prompts = None if self.prompts is None else read_prompts(Path(self.prompts))
            return PredictionFrame(self.image_size, prompts)
        return EvaluationFrame(self.image_size, self.val_masks)

    def collation(self) -> Callable[[list[Any]], Any]:
        """Stacks what is of one size."""
        return collate_frames


def _hash(key: str) -> float:
    """In [0, 1), of an id."""
    return zlib.crc32(key.encode("utf-8", "surrogateescape")) / 2**32
