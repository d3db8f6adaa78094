"""What all data modules share: where the data is, how it is loaded, and what happens when it is not there."""

import logging
import os
from collections.abc import Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch.utils.data import Dataset, default_collate

from datamodules.features import Encoder, FeatureCache
from datamodules.loading import EpochSampler, ResumableLoader, SeededDataset, collate_images, default_ranks
from datamodules.reading import DataError, Listing, OnError, SkipCounter, SkippingDataset, read_image
from datamodules.transforms import ImageTransforms

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test", "predict"]

SHARDED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
"""Strategies whose forward pass is a collective, so that all ranks must run equally many batches."""


@runtime_checkable
class PictureDataset(Protocol):
    """A data set that gives the picture of a sample alone."""

    def picture(self, index: int) -> Image.Image:
        """RGB, in the coordinates of what is predicted of it."""
        ...


class DataModule(LightningDataModule):
    """Reproducible, resumable loaders over the data in ``root``.

    A family subclasses it, says its ``layout``, fills ``datasets`` in ``setup`` and overrides
    ``write_sample`` and, where a licence allows it, ``fetch``.

    Args:
        root: folder of the data; the class says which layout is expected there.
        batch_size: samples of a training batch, on each device.
        eval_batch_size: samples of a batch elsewhere; null: as ``batch_size``.
        num_workers: processes that read, for each loader; 0 reads in the training process.
        seed: of order and augmentation; null: the run's ``seed_everything``.
        pin_memory: read into page-locked memory, where there is a CUDA device.
        persistent_workers: keep the processes from one epoch to the next.
        drop_last: leave an incomplete last training batch out (the ranks' leftovers, too); otherwise the
            ranks are filled up with repeated samples.
        sample: write a small procedural data set in this family's own format into ``root``, unless it is
            there.
        download: fetch the data into ``root``, unless it is there; not all licences allow it.
        on_error: "raise" stops at a sample that cannot be read, "skip" takes the next one and logs how often.
        repeats: repeated augmentation: each image comes this many times in a row, and an epoch keeps its
            length.

    Raises:
        MisconfigurationException: for ``download`` of a family that cannot be downloaded, or ``sample`` of
            one without a sample.
    """

    layout: ClassVar[str] = ""
    """What is expected under ``root``, for people."""

    max_skip_fraction: float = 1.0
    """Share of unreadable samples that ``on_error: skip`` goes on with."""

    def __init__(
        self,
        *,
        root: Path = Path("data"),
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        pin_memory: bool = True,
        persistent_workers: bool = True,
        drop_last: bool = True,
        sample: bool = False,
        download: bool = False,
        on_error: OnError = "raise",
        repeats: int = 1,
    ) -> None:
        super().__init__()
        for option, method, wanted in (("sample", "write_sample", sample), ("download", "fetch", download)):
            if wanted and not self._overrides(method):
                raise MisconfigurationException(
                    f"{type(self).__name__} has no {option}: set {option}: false."
                )
        if sample and download:
            raise MisconfigurationException("sample: true and download: true exclude each other.")
        for option, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"data.init_args.{option}: must be positive, got {size}.")
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.drop_last = drop_last
        self.sample = sample
        self.download = download
        self.on_error: OnError = on_error
        self.repeats = repeats
        self.datasets: dict[str, Dataset[Any]] = {}

    # what a family provides

    def write_sample(self) -> None:
        """Writes the procedural sample into ``root``; leaves what is there already."""

    def fetch(self) -> None:
        """Downloads the data into ``root``; leaves what is there already."""

    def transform(self, split: Split) -> Callable[[Any], Any] | None:
        """From a raw sample of ``split`` to what batches are made of."""
        return None

    def collation(self) -> Callable[[list[Any]], Any]:
        """The function that makes a batch of a list of transformed samples."""
        return default_collate

    def parts(self, split: Split) -> Sequence[str]:
        """Names of the data sets that an evaluation reads one after the other: here one, that of the split.

        A family that needs several, such as a gallery and queries, names them and puts each into
        ``datasets``. Their loaders are then a dict, and a step is told its ``dataloader_idx``.
        """
        return (split,)

    def sampler(self, dataset: Sized, split: Split) -> EpochSampler:
        """The order in which a rank reads a split; a family with an order of its own, such as
        ``IdentitySampler``, overrides this.
        """
        rank, world = self._ranks()
        if split == "train":
            tail: Literal["repeat", "drop", "keep"] = "drop" if self.drop_last else "repeat"
            return EpochSampler(
                dataset, seed=self.run_seed, tail=tail, repeats=self.repeats, rank=rank, num_replicas=world
            )
        tail = "repeat" if self._equal_batches(split, len(dataset), world) else "keep"
        return EpochSampler(dataset, shuffle=False, tail=tail, rank=rank, num_replicas=world)

    # what Lightning calls

    def prepare_data(self) -> None:
        """Fills ``root``, as ``sample`` or ``download`` say."""
        if self.sample:
            self.write_sample()
        elif self.download:
            self.fetch()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of ``datasets["train"]``."""
        return self.loader("train")

    def val_dataloader(self) -> ResumableLoader | dict[str, ResumableLoader]:
        """Batches of ``datasets["val"]``, each sample once."""
        return self.loaders("val")

    def test_dataloader(self) -> ResumableLoader | dict[str, ResumableLoader]:
        """Batches of ``datasets["test"]``, each sample once."""
        return self.loaders("test")

    def predict_dataloader(self) -> ResumableLoader | dict[str, ResumableLoader]:
        """Batches of ``datasets["predict"]``, each sample once."""
        return self.loaders("predict")

    # what they are made of

    @property
    def run_seed(self) -> int:
        """``seed``, or that of ``seed_everything``, or 0."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def loaders(self, split: Split) -> ResumableLoader | dict[str, ResumableLoader]:
        """The loader of a split, or one of each of its parts by their names."""
        parts = self.parts(split)
        if len(parts) == 1:
            return self.loader(split)
        return {part: self.loader(split, part) for part in parts}

    def loader(self, split: Split, part: str | None = None) -> ResumableLoader:
        """The loader of a split, or of one of its parts.

        Raises:
            DataError: the split has no samples.
            MisconfigurationException: there is no such split, or training has less than a batch.
        """
        dataset, counter = self._dataset(part or split), None
        self._check_size(part or split, dataset)
        train = split == "train"
        if self.on_error == "skip":
            counter = SkipCounter(self.num_workers)
            dataset = SkippingDataset(dataset, counter, self.max_skip_fraction)
        seeded = SeededDataset(dataset, self.run_seed if train else None, self.transform(split))
        return ResumableLoader(
            seeded,
            sampler=self.sampler(seeded, split),
            batch_size=self.batch_size if train else self.eval_batch_size or self.batch_size,
            drop_last=train and self.drop_last,
            collate_fn=self.collation(),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            epoch_end=self.epoch_end(part or split, counter),
        )

    def calibration_batches(self, count: int) -> list[Any]:
        """Batches of ``count`` training samples (all of them, if there are fewer), spread evenly over the
        training data and transformed as for evaluation; the same on all ranks.

        Raises:
            MisconfigurationException: there is no training data.
        """
        if "train" not in self.datasets:
            self.setup("fit")
        dataset = self._dataset("train")
        length = len(dataset)  # type: ignore[arg-type]
        if length == 0:
            raise DataError(f"{type(self).__name__}: the train data in {self.root} has no samples.")
        chosen = [length * place // min(count, length) for place in range(min(count, length))]
        size = self.eval_batch_size or self.batch_size
        return [
            self.evaluated_batch(dataset, chosen[start : start + size])
            for start in range(0, len(chosen), size)
        ]

    def evaluated_batch(self, dataset: Dataset[Any], rows: Sequence[int]) -> Any:
        """A batch of some rows, transformed as for evaluation."""
        seeded = SeededDataset(dataset, None, self.transform("val"))
        return self.collation()([seeded[row] for row in rows])

    def epoch_end(self, part: str, counter: SkipCounter | None) -> Callable[[], None] | None:
        """What is called when a loader has read an epoch: here what says how much could not be read."""
        return None if counter is None else partial(counter.report, f"{type(self).__name__}, {part}")

    def _dataset(self, split: str) -> Dataset[Any]:
        if split not in self.datasets:
            raise MisconfigurationException(f"{type(self).__name__} has no {split} data.")
        return self.datasets[split]

    def _check_size(self, split: str, dataset: Dataset[Any]) -> None:
        """Whether there is a batch at all: a run that trains nothing must not look like a success."""
        length, world = len(dataset), self._ranks()[1]  # type: ignore[arg-type]
        if length == 0:
            raise DataError(f"{type(self).__name__}: the {split} data in {self.root} has no samples.")
        if split == "train" and self.drop_last and length // world < self.batch_size:
            each = f" ({length // world} for each of {world} processes)" if world > 1 else ""
            raise MisconfigurationException(
                f"{type(self).__name__}: {length} training samples{each} make no whole batch of batch_size: "
                f"{self.batch_size}, and an incomplete one is left out: lower batch_size, or set "
                "drop_last: false."
            )

    def _ranks(self) -> tuple[int, int]:
        """Rank and number of ranks that split the data; under tensor parallelism some ranks share theirs."""
        sharing = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (sharing["rank"], sharing["num_replicas"]) if sharing else default_ranks()

    def _equal_batches(self, split: Split, length: int, world: int) -> bool:
        strategy = "" if self.trainer is None else type(self.trainer.strategy).__name__
        if length % world == 0 or (strategy not in SHARDED_STRATEGIES and length >= world):
            return False
        if default_ranks()[0] == 0:
            log.warning(
                "%s: %d places in the %s batches are filled with repeated samples, as all %d ranks%s need "
                "equally many batches.",
                *(type(self).__name__, -length % world, split, world, f" of {strategy}" * bool(strategy)),
            )
        return True

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(DataModule, method)

    def picture(self, path: Path | str, index: int | None = None) -> Image.Image:
        """A picture that was predicted on, as its sample had it, for whoever draws on it.

        Args:
            path: of its file.
            index: of the sample; a data set that reads pictures in a way of its own is asked for it.

        Raises:
            CorruptSampleError: it cannot be read.
        """
        dataset = self.datasets.get("predict")
        if index is None or not isinstance(dataset, PictureDataset):
            return read_image(path)
        return dataset.picture(index)

    def feature_cache(self, folder: Path, encoder: Encoder, **options: Any) -> FeatureCache:
        """A cache of a frozen encoder's features, computed as this module reads and on the run's device.

        Args:
            folder: of all caches.
            encoder: what computes them.
            options: `shape`, `dtype` and `shard_bytes` of `FeatureCache`.
        """
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        batch_size = self.eval_batch_size or self.batch_size
        return FeatureCache(folder, encoder, device, batch_size, self.num_workers, self.on_error, **options)

    def announce(self, split: Split, content: str, folder: Path, listing: Listing) -> None:
        """Log on rank 0 what was found where, how much was left out, and whether it is made up."""
        synthetic = ", synthetic" if self.sample else ""
        rank_zero_info(
            f"{type(self).__name__}, {split}: {content} in {folder}{synthetic}{listing.left_out()}."
        )

    def require(self, path: Path) -> None:
        """Makes sure that ``path`` exists.

        Raises:
            FileNotFoundError: naming the path, the layout that is expected, and what would fill ``root``.
        """
        if path.exists():
            return
        remedies = [
            f"{option}: true would {deed}"
            for option, method, deed in (
                ("sample", "write_sample", "write a small procedural data set there"),
                ("download", "fetch", "fetch the data"),
            )
            if self._overrides(method)
        ]
        there = sorted(os.listdir(self.root))[:8] if self.root.is_dir() else []
        holds = f" {self.root} holds {', '.join(there)}." if there else ""
        raise FileNotFoundError(
            f"{type(self).__name__}: {path} does not exist.{holds} Expected under root={self.root}: "
            f"{self.layout}. Set root to where that is{'; ' if remedies else ''}{', or '.join(remedies)}."
        )


class TransformImage:
    """Applies an image transform to the "image" of a sample."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with the new image."""
        return {**sample, "image": self.transform(sample["image"])}


class WhereImage(TransformImage):
    """The same for samples that have one, and nothing for captions without."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample, with the new image where it had one."""
        return super().__call__(sample) if "image" in sample else sample


class VisionDataModule(DataModule):
    """Images with one label each.

    Batches are dicts: "image" float32 (B, 3, H, W) in [0, 1], not normalised; "label" int64 (B,); "index"
    int64 (B,), the position in the data set; where the images are files, predictions also get "path", a list
    of B strings.

    Args:
        transforms: crops and augmentation.
        sample_size: number of training images that ``sample: true`` writes; a quarter as many to evaluate on.
        sample_classes: number of classes that it writes, at most 100.
        options: of ``DataModule``.
    """

    def __init__(
        self,
        *,
        transforms: ImageTransforms = ImageTransforms(),
        sample_size: int = 2000,
        sample_classes: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 1 < sample_classes <= 100:
            raise ValueError(f"sample_classes must be between 2 and 100, got {sample_classes}.")
        self.transforms = transforms
        self.sample_size = sample_size
        self.sample_classes = sample_classes

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels; known before ``setup`` where that is cheap."""
        raise MisconfigurationException(f"{type(self).__name__} has no classes.")

    @property
    def num_classes(self) -> int:
        """Number of classes; known before ``setup``."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height and width of what the network sees, pixels."""
        return self.transforms.image_size

    def announce_classes(self, labels: Sequence[int]) -> None:
        """Log on rank 0 what each label means, and how many images it has; of many classes the first."""
        counts = torch.bincount(torch.as_tensor(labels), minlength=self.num_classes).tolist()
        shown = [
            f"{label} {name} ({count})"
            for label, (name, count) in enumerate(zip(self.class_names, counts, strict=False))
        ]
        more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
        rank_zero_info(f"classes: {', '.join(shown[:20])}{more}")

    def transform(self, split: Split) -> Callable[[Any], Any]:
        """The image transform of training or of evaluation."""
        chosen = self.transforms.train() if split == "train" else self.transforms.evaluation()
        return TransformImage(chosen)

    def collation(self) -> Callable[[list[Any]], Any]:
        """Makes batches with float32 images."""
        return collate_images
