"""COCO, and whatever else comes in its format."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.base import DataModule, Split
from datamodules.coco.annotations import CocoAnnotations
from datamodules.coco.dataset import CocoDataset, PictureFolder, collate_detection
from datamodules.coco.labels import NO_CLASS, check_names, ids_by_label, names_by_label, numbered_labels
from datamodules.coco.transforms import DecoTransforms, DetectionTransforms
from datamodules.coco.values import shown
from datamodules.loading import default_ranks
from datamodules.reading import DataError
from datamodules.samples.coco import SceneStyle, write_coco

log = logging.getLogger(__name__)

ARCHIVES = {
    "annotations": ("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
    "val2017": ("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
    "train2017": ("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
}
"""Folder, address under images.cocodataset.org and MD5 of what `download: true` fetches (19 GB)."""


class CocoDataModule(DataModule):
    """Detection data in COCO's layout.

    Batches are dicts: "image" float32 (B, 3, H, W) in [0, 1], black below and right of images that are
    smaller than the largest; "mask" bool (B, H, W), true where nothing but padding is; "index" int64 (B,);
    "path", B strings; "targets", B dicts of "boxes" (n, 4) as (x1, y1, x2, y2) in pixels of the image as
    it is in the batch, "labels" int64 (n,), "size" and "orig_size" int64 (2,), its height and width in the
    batch and on disk, "image_id", and, if asked for, "masks" bool (n, h, w); if asked for, "captions", B
    lists of strings; in evaluation "annotations", B lists of dicts for COCO's evaluation, crowds included.

    Labels go by the categories' names in the training file, whatever ids another file gives them. Pictures
    are upright, or as they are stored where the size in the annotation file says that they were annotated so.

    Args:
        transforms: recipe; null is DECO's.
        train_split: name of the training split.
        val_split: of the validation split.
        test_split: of the test split; null is the validation split, as COCO's test images have no public
            annotations.
        images: folder of a split's images, under root.
        instances: annotation file of a split, under root.
        contiguous_labels: labels are the places of the training file's sorted category ids; otherwise the ids
            themselves, which then must be numbers.
        classes: names of the only categories to use, such as ``[person]``; null is all.
        masks: add the objects' masks to the targets.
        captions: annotation file of a split with captions, under root
            (``annotations/captions_{split}.json``); null adds none.
        allow_outside: read files that the annotations name outside of root, by `..` or an absolute path.
        predict_folder: images to predict on; null is the test split.
        batch_size: samples of a training batch, on each device.
        sample_size: number of training images that ``sample: true`` writes; a quarter as many to evaluate on.
        sample_image_size: their shorter side, pixels.
        sample_style: how hard they are.
        options: of ``DataModule``.
    """

    layout: ClassVar[str] = (
        "{train,val}2017/*.jpg and annotations/instances_{train,val}2017.json, or as images and instances say"
    )

    def __init__(
        self,
        *,
        transforms: DetectionTransforms | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str | None = None,
        images: str = "{split}",
        instances: str = "annotations/instances_{split}.json",
        contiguous_labels: bool = False,
        classes: list[str] | None = None,
        masks: bool = False,
        captions: str | None = None,
        allow_outside: bool = False,
        predict_folder: Path | None = None,
        batch_size: int = 2,
        sample_size: int = 200,
        sample_image_size: int = 160,
        sample_style: SceneStyle = SceneStyle(),
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.transforms = DecoTransforms() if transforms is None else transforms
        self.splits: dict[Split, str] = {
            "train": train_split,
            "val": val_split,
            "test": val_split if test_split is None else test_split,
        }
        self.images = images
        self.instances = instances
        self.contiguous_labels = contiguous_labels
        self.classes = classes
        self.masks = masks
        self.captions = captions
        self.allow_outside = allow_outside
        self.predict_folder = predict_folder
        self.sample_size = sample_size
        self.sample_image_size = sample_image_size
        self.sample_style = sample_style
        for option, pattern in (("images", images), ("instances", instances), ("captions", captions or "")):
            _check_pattern(option, pattern)
        self._opened: dict[Path, CocoAnnotations] = {}
        self._labels: dict[str, int] | None = None
        self._labels_of = ""

    # data on disk

    def write_sample(self) -> None:
        """Writes drawn scenes."""
        write_coco(self.root, self.sample_size, self.sample_image_size, style=self.sample_style)

    def fetch(self) -> None:
        """Downloads COCO 2017 (images under their owners' Flickr licences, annotations CC BY 4.0)."""
        from torchvision.datasets.utils import download_and_extract_archive

        self.root.mkdir(parents=True, exist_ok=True)
        for name, (address, digest) in ARCHIVES.items():
            if (self.root / name).is_dir():
                continue
            with tempfile.TemporaryDirectory(dir=self.root, prefix=f".{name}-") as folder:
                url = f"http://images.cocodataset.org/{address}"
                download_and_extract_archive(url, folder, md5=digest, remove_finished=True)
                (Path(folder) / name).rename(self.root / name)

    def prepare_data(self) -> None:
        """Fills ``root`` if wanted, and parses each annotation file once for all processes of a node."""
        super().prepare_data()
        for split in sorted(set(self.splits.values())):
            for pattern in (self.instances, self.captions):
                path = None if pattern is None else self.root / pattern.format(split=split)
                if path is not None and path.is_file():
                    self._annotations(path)

    def setup(self, stage: str) -> None:
        """Opens the splits of a stage.

        Raises:
            FileNotFoundError: an image folder or annotation file is not there; names the path.
            DataError: `classes` are unknown, an annotation file is wrong, or there is nothing to learn from
                it or to measure by it.
        """
        wanted: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("test",),
        }
        if stage == "predict" and self.predict_folder is not None:
            pictures = PictureFolder(self.predict_folder)
            self.announce("predict", f"{len(pictures)} images", self.predict_folder, pictures.listing)
            self.datasets["predict"] = pictures
            return
        for split in wanted[stage]:
            truth = stage != "predict" and split != "train"
            dataset = self._open(split, truth)
            self.datasets["predict" if stage == "predict" else split] = dataset
            if stage != "predict":
                self._count(split, dataset, needed=stage != "fit" or split == "train")

    def _open(self, split: Split, truth: bool) -> CocoDataset:
        name = self.splits[split]
        folder, path = self.root / self.images.format(split=name), self._path(split)
        self.require(folder)
        self.require(path)
        captions = None
        if self.captions is not None:
            self.require(self.root / self.captions.format(split=name))
            captions = self._annotations(self.root / self.captions.format(split=name))
        annotations = self._annotations(path)
        if not len(annotations):
            raise DataError(f"{path} lists no images.")
        labels = self.labels
        if self.classes is None:
            check_names(annotations, labels, self._labels_of)
        dataset = CocoDataset(folder, annotations, labels, self.masks, truth, captions)
        outside = [] if self.allow_outside else dataset.outside(self.root)
        if outside:
            raise DataError(
                f"{path}: the file_name {shown(annotations.file_name(outside[0]))} (images[{outside[0]}]) "
                f"leads out of root={self.root}; set data.init_args.allow_outside: true to read such files."
            )
        return dataset

    def _count(self, split: Split, dataset: CocoDataset, needed: bool) -> None:
        """Say what a split has, and what is left out; stop where nothing is left."""
        census, path = dataset.census(), dataset.annotations.path
        left_out = [
            (census.empty, "boxes without area or outside of their picture"),
            (census.other, "objects of other classes"),
            (census.ignored, "annotations of category id -1, which is taken as no class"),
        ]
        if self.masks:
            left_out.append((census.short, "polygon parts of fewer than three points"))
        parts = [f"{count} {kind}" for count, kind in left_out if count]
        said = f"; left out: {', '.join(parts)}" if parts else ""
        said = f"{census.objects} objects and {census.crowds} crowds in {len(dataset)} images{said}"
        if census.reaching:
            said += f"; {census.reaching} boxes reach out of their picture, and training sees them clipped"
        if self.masks and census.shapeless:
            said += f"; {census.shapeless} objects have no segmentation, so their masks are empty"
        if not census.objects and needed:
            purpose = "learn from" if split == "train" else "measure by"
            raise DataError(f"{path} has nothing to {purpose}: {said}.")
        if default_ranks()[0] == 0:
            odd = census.empty or census.ignored or not census.objects
            odd = odd or (self.masks and (census.short or census.shapeless))
            said = f"{type(self).__name__}, {split}: {path} has {said}."
            if odd:
                log.warning(said)
            else:
                rank_zero_info(said)
            if split == "train":
                shown = [f"{label} {name}" for name, label in list(self.labels.items())[:20]]
                more = f" and {len(self.labels) - 20} more" if len(self.labels) > 20 else ""
                rank_zero_info(f"classes: {', '.join(shown)}{more}")

    def _path(self, split: Split) -> Path:
        """The annotation file of a split."""
        return self.root / self.instances.format(split=self.splits[split])

    def _annotations(self, path: Path) -> CocoAnnotations:
        if path not in self._opened:
            self._opened[path] = CocoAnnotations(path)
        return self._opened[path]

    # classes

    @property
    def _numbering(self) -> Path:
        """The annotation file of training, or of val or test where there is none."""
        return next((path for path in map(self._path, self.splits) if path.is_file()), self._path("train"))

    @property
    def labels(self) -> dict[str, int]:
        """The label of each class name, as the training file numbers them, or a model that was loaded."""
        if self._labels is None:
            path = self._numbering
            self.require(path)
            if path != self._path("train") and default_ranks()[0] == 0:
                log.warning(
                    "%s: there is no %s, so labels are numbered as in %s.",
                    *(type(self).__name__, self._path("train"), path),
                )
            self._labels = numbered_labels(self._annotations(path), self.contiguous_labels, self.classes)
            self._labels_of = str(path)
        return self._labels

    def use_class_names(self, names: Sequence[str]) -> None:
        """Number the labels as somebody else does, such as a trained model; also in what is open already.

        Args:
            names: of the labels, in order.

        Raises:
            DataError: an open file has a class that is not among them.
        """
        labels = {name: label for label, name in enumerate(names) if name != NO_CLASS}
        source = "the model that was loaded"
        if self.classes is not None:
            unknown = sorted(set(self.classes) - set(labels))
            if unknown:
                raise DataError(
                    f"classes: {source} has no class {', '.join(unknown)}; it has {', '.join(labels)}."
                )
            labels = {name: label for name, label in labels.items() if name in self.classes}
        for dataset in self.datasets.values():
            if isinstance(dataset, CocoDataset):
                if self.classes is None:
                    check_names(dataset.annotations, labels, source)
                dataset.relabel(labels)
        self._labels, self._labels_of = labels, source

    @property
    def class_names(self) -> list[str]:
        """The name of each label; `no class` for labels that no category has."""
        return names_by_label(self.labels)

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return max(self.labels.values()) + 1

    # predictions

    @property
    def category_ids(self) -> list[int | str]:
        """The COCO id of each label in the file that is predicted on, where that has categories, and else in
        the one that numbers the labels; -1 for labels that no category has.
        """
        labels, predicted = self.labels, self.datasets.get("predict")
        if isinstance(predicted, CocoDataset) and predicted.annotations.categories:
            return ids_by_label(predicted.annotations, labels)
        path = self._numbering
        if not path.is_file():  # a folder is predicted on with the names of a model
            return [label if name in labels else -1 for label, name in enumerate(names_by_label(labels))]
        return ids_by_label(self._annotations(path), labels)

    def predicted_entry(self, index: int) -> dict[str, Any]:
        """`image_id` and `file_name` of an image that is predicted on, as its annotation file writes them."""
        return self._predicted.entry(index)

    @property
    def _predicted(self) -> CocoDataset | PictureFolder:
        dataset = self._dataset("predict")
        assert isinstance(dataset, (CocoDataset, PictureFolder))
        return dataset

    # batches

    def transform(self, split: Split) -> Callable[[Any], Any]:
        """The recipe's transform of training or of evaluation."""
        return self.transforms.train() if split == "train" else self.transforms.evaluation()

    def collation(self) -> Callable[[list[Any]], Any]:
        """Pads and stacks."""
        return collate_detection


def _check_pattern(option: str, pattern: str) -> None:
    try:
        pattern.format(split="train2017")
    except (LookupError, ValueError) as error:
        raise MisconfigurationException(
            f"CocoDataModule: {option}: '{pattern}' may have nothing but {{split}} in braces."
        ) from error
