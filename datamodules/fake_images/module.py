"""Real and generated images by generator: ForenSynths / UniversalFakeDetect and GenImage."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split, TransformImage
from datamodules.fake_images.layouts import (
    Layout,
    Manifest,
    Pair,
    held_out,
    in_paper_order,
    limited,
    printed_name,
    read_layout,
)
from datamodules.fake_images.transforms import Degradation, FakeImageTransforms
from datamodules.features import FeatureDataset
from datamodules.imagenet import ImageFileDataset
from datamodules.loading import ResumableLoader, collate_images
from datamodules.reading import Listing, list_images
from datamodules.samples.fake_images import write_fake_images

log = logging.getLogger(__name__)

REAL, FAKE = 0, 1


class FakeImagesDataModule(DataModule):
    """Photographs (label 0) and generated images (label 1), set by set.

    Batches are dicts: "image" float32 (B, 3, H, W) in [0, 1], or with ``cache`` "features" float32 (B,
    width); "label" int64 (B,); "generator" int64 (B,), the place in ``generator_names``; "index" int64 (B,);
    in predictions from files also "path".

    Training reads what the module asks for: its ``training_labels(epoch)`` says which labels an epoch reads,
    as GenDet's stages read only reals or only fakes. That needs
    ``trainer.reload_dataloaders_every_n_epochs: 1``.

    Validation is made of the generators that are trained on: of the layout's own validation folders where it
    has them (ForenSynths), else of a part of the training images that is held out. No test image is in it.

    Args:
        dataset: how it is laid out. `universal` is ``{train,val}/progan/<class>/{0_real,1_fake}`` and
            ``test/<name>/...``, ``diffusion_datasets/...``; `genimage` is
            ``<generator>/[<archive>/]{train,val}/{ai,nature}``.
        train_on: generators to train on (cross-generator protocol); null: all with training images.
        leave_out: generators that are not trained on, of those (leave one generator out).
        test_on: generators to test on; null: all. Those that were not trained on are reported as unseen.
        classes: of the training images in the universal layout, such as [car, cat, chair, horse].
        transforms: crops and augmentation.
        degradation: of the test images.
        cache: folder of the cached features of the module's ``encoder``; null reads images in every epoch.
        views: with ``cache``: how many drawings of the training transform are kept of each training image;
            0 keeps the one of evaluation.
        val_fraction: held out of the training images where the layout has no validation images.
        max_per_class: most real and most generated images of a test set.
        small_set_rule: `peer`: a set with less than ``max_per_class`` of either is cut to 100 of each, as
            UniversalFakeDetect does.
        predict_folder: images to predict on; null: the test images.
        sample_size: training pictures of each generator that ``sample: true`` writes.
        sample_image_size: their height and width, pixels.
        options: of ``DataModule``. ``on_error: skip`` looks at every image before the first epoch, and leaves
            unreadable ones out.

    Raises:
        MisconfigurationException: a generator is unknown; lists those that there are.
    """

    layout: ClassVar[str] = (
        "dataset: universal wants train/progan/<class>/{0_real,1_fake} and test/<name>/.../{0_real,1_fake}; "
        "dataset: genimage wants <generator>/[<archive>/]{train,val}/{ai,nature}"
    )

    def __init__(
        self,
        *,
        root: Path = Path("data"),
        dataset: Layout = "genimage",
        train_on: list[str] | None = None,
        leave_out: list[str] | None = None,
        test_on: list[str] | None = None,
        classes: list[str] | None = None,
        transforms: FakeImageTransforms = FakeImageTransforms(),
        degradation: Degradation = Degradation(),
        cache: Path | None = None,
        views: int = 0,
        val_fraction: float = 0.1,
        max_per_class: int | None = None,
        small_set_rule: Literal["all", "peer"] = "all",
        predict_folder: Path | None = None,
        sample_size: int = 120,
        sample_image_size: int = 64,
        batch_size: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(root=root, batch_size=batch_size, **options)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction}.")
        self.dataset = dataset
        self.train_on = train_on
        self.leave_out = leave_out or []
        self.test_on = test_on
        self.classes = classes
        self.transforms = transforms
        self.degradation = degradation
        self.cache = cache
        self.views = views
        self.val_fraction = val_fraction
        self.max_per_class = max_per_class
        self.small_set_rule = small_set_rule
        self.predict_folder = predict_folder
        self.sample_size = sample_size
        self.sample_image_size = sample_image_size
        self.generator_names: list[str] = []
        self.seen_generators: list[str] = []

    def write_sample(self) -> None:
        """Writes drawn pictures and six generators' versions of them, in the layout of ``dataset``."""
        write_fake_images(self.root, self.dataset, self.sample_size, self.sample_image_size)

    # what there is

    def setup(self, stage: str) -> None:
        """Lists the files, and computes the features that are missing.

        Raises:
            FileNotFoundError: a set has no real or no generated images, or a folder is not there.
            MisconfigurationException: a generator is unknown, or features are wanted of a module that has no
                encoder.
        """
        if stage == "predict" and self.predict_folder is not None:
            self.datasets["predict"] = self._folder(self.predict_folder)
            return
        self.require(self.root)
        manifest = read_layout(self.root, self.dataset, self.classes)
        names = in_paper_order({*manifest.train, *manifest.test}, self.dataset)
        self.generator_names = names
        self.seen_generators = self._seen(manifest)
        if stage in ("fit", "validate"):
            train, val = self._training_sets(manifest)
            if stage == "fit":
                self._say("train", train, manifest.left_out)
                self.datasets["train"] = self._open("train", train)
            self._say("val", val, manifest.left_out)
            self.datasets["val"] = self._open("val", val)
        elif stage in ("test", "predict"):
            split: Split = "test" if stage == "test" else "predict"
            test = self._test_sets(manifest)
            self._say(split, test, manifest.left_out)
            self.datasets[split] = self._open("test", test) if split == "test" else self._images(split, test)

    def _say(self, split: Split, sets: dict[str, Pair], left_out: Listing) -> None:
        real, fake = (sum(len(pair[kind]) for pair in sets.values()) for kind in (REAL, FAKE))
        self.announce(
            split, f"{real} real and {fake} generated images, {len(sets)} sets", self.root, left_out
        )

    @property
    def printed_names(self) -> dict[str, str]:
        """The papers' names of the generators."""
        return {name: printed_name(name) for name in self.generator_names}

    def _seen(self, manifest: Manifest) -> list[str]:
        if not manifest.train:
            raise FileNotFoundError(
                f"{self.root} has no generator with training images. Expected: {self.layout}."
            )
        wanted = list(manifest.train) if self.train_on is None else self.train_on
        self._known("train_on", wanted, manifest.train)
        self._known("leave_out", self.leave_out, self.generator_names)
        seen = [name for name in self.generator_names if name in wanted and name not in self.leave_out]
        if not seen:
            raise MisconfigurationException("train_on and leave_out leave no generator to train on.")
        return seen

    def _known(self, option: str, wanted: Iterable[str], there: Iterable[str]) -> None:
        unknown = sorted(set(wanted) - set(there))
        if unknown:
            listed = in_paper_order(there, self.dataset)
            raise MisconfigurationException(
                f"{option}: {self.root} has no generator {', '.join(unknown)}; it has {', '.join(listed)}."
            )

    def _training_sets(self, manifest: Manifest) -> tuple[dict[str, Pair], dict[str, Pair]]:
        train, val = {}, {}
        for name in self.seen_generators:
            if name in manifest.val:
                train[name], val[name] = manifest.train[name], manifest.val[name]
            else:
                train[name], val[name] = held_out(manifest.train[name], self.val_fraction)
            if not all((*train[name], *val[name])):
                raise MisconfigurationException(
                    f"val_fraction: {self.val_fraction} leaves no real or no generated image of {name} to "
                    f"train or to validate on: {self.root} has {len(manifest.train[name].real)} and "
                    f"{len(manifest.train[name].fake)}."
                )
        return train, val

    def _test_sets(self, manifest: Manifest) -> dict[str, Pair]:
        if not manifest.test:
            raise FileNotFoundError(f"{self.root} has no test images. Expected: {self.layout}.")
        wanted = list(manifest.test) if self.test_on is None else self.test_on
        self._known("test_on", wanted, manifest.test)
        peer = self.small_set_rule == "peer"
        return {
            name: limited(manifest.test[name], self.max_per_class, peer)
            for name in self.generator_names
            if name in wanted
        }

    @property
    def image_size(self) -> int:
        """Height and width of what the network sees, pixels."""
        return self.transforms.image_size

    # data sets

    def _open(self, split: Split, sets: dict[str, Pair]) -> Dataset[Any]:
        return self._images(split, sets) if self.cache is None else self._features(split, sets)

    def _images(self, split: Split, sets: dict[str, Pair]) -> "FakeImageDataset":
        parts = [(name, label, files) for name, pair in sets.items() for label, files in enumerate(pair)]
        if self.on_error == "skip":
            parts = [(name, label, self._readable(files)) for name, label, files in parts]
        return FakeImageDataset(
            self.root,
            [file for _, _, files in parts for file in files],
            [label for _, label, files in parts for _ in files],
            [self.generator_names.index(name) for name, _, files in parts for _ in files],
            with_path=split == "predict",
        )

    def _readable(self, files: Sequence[str]) -> list[str]:
        """Files that are whole as far as a look at the file can tell; the same on every rank."""
        good = []
        for file in files:
            try:
                with Image.open(self.root / file) as image:
                    image.verify()
                good.append(file)
            except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
                log.warning("skipped: %s (%s: %s)", self.root / file, type(error).__name__, error)
        if len(good) < len(files):
            log.warning("%d unreadable images are left out (on_error: skip).", len(files) - len(good))
        return good

    def _features(self, split: Split, sets: dict[str, Pair]) -> FeatureDataset:
        module = None if self.trainer is None else self.trainer.lightning_module
        encoder = getattr(module, "encoder", None)
        if encoder is None or self.cache is None or self.trainer is None:
            raise MisconfigurationException(
                f"cache: {type(module).__name__} has no encoder to cache the features of; set cache: null."
            )
        cache = self.feature_cache(self.cache, encoder)
        drawn = split == "train" and self.views > 0
        transform = self.transforms.train() if drawn else self._evaluation(split)
        stores, labels, generators = [], [], []
        for name, pair in sets.items():
            for label, files in enumerate(pair):
                part = f"{name}-{('real', 'fake')[label]}"
                seed, views = (self.run_seed, self.views) if drawn else (None, 1)
                stores.append(cache.open(part, self.root, files, transform, repr(transform), views, seed))
                labels.append(label)
                generators.append(self.generator_names.index(name))
        return FeatureDataset(stores, labels, generators, self.run_seed if drawn else None)

    def feature_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (width,) of the training reals' features; None without ``cache``."""
        dataset = self.datasets.get("train")
        return dataset.statistics(REAL) if isinstance(dataset, FeatureDataset) else None

    def _folder(self, folder: Path) -> ImageFileDataset:
        if not folder.is_dir():
            raise FileNotFoundError(f"predict_folder: there is no folder {folder}.")
        listing = list_images(folder)
        if not listing.names:
            raise FileNotFoundError(f"predict_folder: no images in {folder}{listing.left_out()}.")
        self.announce("predict", f"{len(listing.names)} images", folder, listing)
        return ImageFileDataset(folder, listing.names, with_path=True)

    # loaders

    def transform(self, split: Split) -> Callable[[Any], Any]:
        """The image transform of training or of evaluation; degraded in tests."""
        return TransformImage(self.transforms.train() if split == "train" else self._evaluation(split))

    def _evaluation(self, split: Split) -> Callable[[Image.Image], Tensor]:
        return self.transforms.evaluation(self.degradation if split == "test" else Degradation())

    def collation(self) -> Callable[[list[Any]], Any]:
        """Makes batches with float32 images."""
        return collate_images

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of what the module's current epoch reads; an incomplete last batch is left out
        where there is a whole one.
        """
        kept = self.drop_last
        self.drop_last = kept and len(self._dataset("train")) // self._ranks()[1] >= self.batch_size  # type: ignore[arg-type]
        try:
            return self.loader("train")
        finally:
            self.drop_last = kept

    def loader(self, split: Split, part: str | None = None) -> ResumableLoader:
        """The loader of a split; cached features are read here, not in workers."""
        dataset = self._dataset(split)
        if not isinstance(dataset, FeatureDataset):
            return super().loader(split, part)
        self._check_size(split, dataset)
        train = split == "train"
        rows: Any = dataset  # a sampler only asks for its length
        return ResumableLoader(
            dataset,
            sampler=self.sampler(rows, split),
            batch_size=self.batch_size if train else self.eval_batch_size or self.batch_size,
            drop_last=train and self.drop_last,
            collate_fn=_whole,
        )

    def evaluated_batch(self, dataset: Dataset[Any], rows: Sequence[int]) -> Any:
        """A batch of some rows, transformed as for evaluation; cached features as they are."""
        if isinstance(dataset, FeatureDataset):
            return dataset.__getitems__(rows)
        return super().evaluated_batch(dataset, rows)

    def _dataset(self, split: str) -> Dataset[Any]:
        dataset = super()._dataset(split)
        if split != "train" or not isinstance(dataset, (FakeImageDataset, FeatureDataset)):
            return dataset
        ask = (
            None if self.trainer is None else getattr(self.trainer.lightning_module, "training_labels", None)
        )
        if ask is None or self.trainer is None:
            return dataset
        labels = ask(self.trainer.current_epoch)
        chosen = dataset.of(labels)
        world = self._ranks()[1]
        if len(chosen) < world:
            raise MisconfigurationException(
                f"An epoch that reads labels {list(labels)} has {len(chosen)} images for {world} processes."
            )
        return chosen


class FakeImageDataset(ImageFileDataset):
    """Image files with a label and the number of a set.

    Args:
        folder: that the names are relative to.
        names: of the files.
        labels: 0 real, 1 fake.
        generators: numbers of the sets.
        with_path: add "path" to the samples.
    """

    def __init__(
        self,
        folder: Path,
        names: list[str],
        labels: list[int],
        generators: list[int],
        with_path: bool = False,
    ) -> None:
        super().__init__(folder, names, labels, with_path)
        self.truth = np.array(labels, np.int64)
        self.generators = np.array(generators, np.int64)
        self.chosen = np.arange(len(names))

    def of(self, labels: Sequence[int]) -> "FakeImageDataset":
        """The images with one of these labels; an image keeps its ``index``."""
        view = object.__new__(FakeImageDataset)
        view.__dict__ = {**self.__dict__, "chosen": np.flatnonzero(np.isin(self.truth, list(labels)))}
        return view

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.chosen[index])
        return {**super().__getitem__(row), "generator": int(self.generators[row])}


def _whole(batch: Any) -> Any:
    """Batches of features come as such from their data set."""
    return batch
