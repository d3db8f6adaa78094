"""COCO, and whatever else comes in its format."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split
from datamodules.coco.annotations import CocoAnnotations
from datamodules.coco.transforms import DecoTransforms, DetectionTransforms
from datamodules.reading import list_images, read_image
from datamodules.samples.coco import SceneStyle, write_coco

ARCHIVES = {
    "annotations": ("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
    "val2017": ("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
    "train2017": ("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
}
"""Folder, address under images.cocodataset.org and MD5 of what `download: true` fetches (19 GB)."""


class CocoDataset(Dataset[dict[str, Any]]):
    """Images with their objects, read when asked for.

    Samples: `image` (Pillow's, RGB), `boxes` (n, 4) float32 pixel corners clipped to the image, `labels`
    (n,) int64, `orig_size` (2,) as height and width, `image_id`, `index`, `path`; if asked for, `masks`
    (n, H, W) bool, `captions` (strings), and `annotations`, the ground truth for COCO's evaluation as
    dictionaries of `bbox` (x, y, w, h), `area`, `iscrowd` and `category_id` (the label). Crowds, and boxes
    without area, are only in the last. Boxes and masks are torchvision's tv_tensors.

    Args:
        folder: of the images.
        annotations: of them.
        labels: from category ids to labels; other categories are left out.
        masks: add the objects' masks.
        truth: add `annotations`.
        captions: annotations to take captions from, for the same images.
    """

    def __init__(
        self,
        folder: Path,
        annotations: CocoAnnotations,
        labels: Mapping[int, int],
        masks: bool = False,
        truth: bool = False,
        captions: CocoAnnotations | None = None,
    ) -> None:
        self.folder = folder
        self.annotations = annotations
        self.labels = dict(labels)
        self.masks = masks
        self.truth = truth
        self.captions = captions
        self._caption_rows: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.folder, self.annotations.file_name(index))
        image = read_image(path)
        found = self.annotations.of(index)
        found = found[np.isin(found["category"], list(self.labels))]
        boxes = _clipped_corners(found["bbox"], image.width, image.height)
        kept = ~found["crowd"] & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        sample: dict[str, Any] = {
            "image": image,
            "index": index,
            "path": path,
            "image_id": int(self.annotations.images[index]["id"]),
            **_objects(boxes[kept], [self.labels[int(key)] for key in found["category"][kept]], image.size),
        }
        if self.masks:
            sample["masks"] = self._masks(found[kept], image.height, image.width)
        if self.truth:
            sample["annotations"] = [self._truth(annotation) for annotation in found]
        if self.captions is not None:
            sample["captions"] = self._captions(self.captions, sample["image_id"])
        return sample

    def _truth(self, annotation: Any) -> dict[str, Any]:
        return {
            "bbox": annotation["bbox"].tolist(),
            "area": float(annotation["area"]),
            "iscrowd": int(annotation["crowd"]),
            "category_id": self.labels[int(annotation["category"])],
        }

    def _masks(self, annotations: NDArray[Any], height: int, width: int) -> Tensor:
        from torchvision.tv_tensors import Mask

        shapes = [self.annotations.segmentation(annotation) for annotation in annotations]
        masks = [decode_segmentation(shape, height, width) for shape in shapes]
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.bool_)
        return Mask(torch.from_numpy(stacked))

    def _captions(self, captions: CocoAnnotations, image_id: int) -> list[str]:
        if self._caption_rows is None:
            self._caption_rows = {int(key): row for row, key in enumerate(captions.images["id"])}
        row = self._caption_rows.get(image_id)
        return [] if row is None else [captions.caption(entry) for entry in captions.of(row)]


class PictureFolder(Dataset[dict[str, Any]]):
    """Pictures to predict on, as samples without objects.

    Image ids are the numbers that the files are called by if all are, as in COCO, and else the positions in
    the sorted list.

    Args:
        folder: of the image files.

    Raises:
        FileNotFoundError: it is none, or there are no images in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"predict_folder: there is no folder {folder}.")
        self.folder = folder
        self.names = list_images(folder).names
        if not self.names:
            raise FileNotFoundError(f"predict_folder: there are no images in {folder}.")
        stems = [Path(name).stem for name in self.names]
        numbered = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(
            stems
        )
        self.ids = [int(stem) for stem in stems] if numbered else list(range(len(stems)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = str(self.folder / self.names[index])
        image = read_image(path)
        known = {"image": image, "index": index, "path": path, "image_id": self.ids[index]}
        return {**known, **_objects(np.zeros((0, 4)), [], image.size)}


def _objects(boxes: NDArray[Any], labels: list[int], size: tuple[int, int]) -> dict[str, Any]:
    """`boxes`, `labels` and `orig_size` of an image of `size` (width, height)."""
    from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

    canvas = (size[1], size[0])
    corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    kind = BoundingBoxFormat.XYXY
    return {
        "boxes": BoundingBoxes(corners, format=kind, canvas_size=canvas),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "orig_size": torch.tensor(canvas),
    }


def _clipped_corners(boxes: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """(n, 4) as x, y, w, h to corners within the image."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, (width, height, width, height))


def decode_segmentation(shape: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Polygons, or compressed or plain run lengths, of a COCO annotation as a mask (height, width)."""
    from pycocotools import mask as coco_mask

    if not shape:
        return np.zeros((height, width), np.bool_)
    if isinstance(shape, list):
        lengths = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        lengths = coco_mask.frPyObjects(shape, height, width)
    else:
        lengths = shape
    return coco_mask.decode(lengths).astype(np.bool_)


def collate_detection(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of transformed samples, see `CocoDataModule`."""
    height, width = (max(int(sample["size"][axis]) for sample in samples) for axis in (0, 1))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    targets = []
    for place, sample in enumerate(samples):
        rows, columns = sample["size"].tolist()
        images[place, :, :rows, :columns] = sample["image"]
        mask[place, :rows, :columns] = False
        names = ("boxes", "labels", "size", "orig_size", "masks")
        target = {name: sample[name] for name in names if name in sample}
        targets.append({**target, "image_id": torch.tensor(sample["image_id"])})
    batch = {
        "image": images.float().div_(255),
        "mask": mask,
        "targets": targets,
        "index": torch.tensor([sample["index"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
    }
    lists = ("captions", "annotations")
    return batch | {name: [sample[name] for sample in samples] for name in lists if name in samples[0]}


class CocoDataModule(DataModule):
    """Detection data in COCO's layout.

    Batches are dicts: "image" float32 (B, 3, H, W) in [0, 1], black below and right of images that are
    smaller than the largest; "mask" bool (B, H, W), true where nothing but padding is; "index" int64 (B,);
    "path", B strings; "targets", B dicts of "boxes" (n, 4) as (x1, y1, x2, y2) in pixels of the image as
    it is in the batch, "labels" int64 (n,), "size" and "orig_size" int64 (2,), its height and width in the
    batch and on disk, "image_id", and, if asked for, "masks" bool (n, h, w); if asked for, "captions", B
    lists of strings; in evaluation "annotations", B lists of dicts for COCO's evaluation, crowds included.

    Args:
        transforms: recipe; null is DECO's.
        train_split: name of the training split.
        val_split: of the validation split.
        test_split: of the test split; null is the validation split, as COCO's test images have no public
            annotations.
        images: folder of a split's images, under root.
        instances: annotation file of a split, under root.
        contiguous_labels: labels are the places of the sorted category ids; otherwise the ids themselves.
        classes: names of the only categories to use, such as ``[person]``; null is all.
        masks: add the objects' masks to the targets.
        captions: annotation file of a split with captions, under root
            (``annotations/captions_{split}.json``); null adds none.
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
        self.predict_folder = predict_folder
        self.sample_size = sample_size
        self.sample_image_size = sample_image_size
        self.sample_style = sample_style
        self._opened: dict[Path, CocoAnnotations] = {}

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
            ValueError: `classes` are unknown, or an annotation file is wrong.
        """
        wanted: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("test",),
        }
        if stage == "predict" and self.predict_folder is not None:
            self.datasets["predict"] = PictureFolder(self.predict_folder)
            return
        for split in wanted[stage]:
            place: Split = "predict" if stage == "predict" else split
            self.datasets[place] = self._open(split, truth=stage != "predict" and split != "train")

    def _open(self, split: Split, truth: bool) -> CocoDataset:
        name = self.splits[split]
        folder, path = (
            self.root / self.images.format(split=name),
            self.root / self.instances.format(split=name),
        )
        self.require(folder)
        self.require(path)
        captions = None
        if self.captions is not None:
            self.require(self.root / self.captions.format(split=name))
            captions = self._annotations(self.root / self.captions.format(split=name))
        annotations = self._annotations(path)
        return CocoDataset(folder, annotations, self._labels(annotations), self.masks, truth, captions)

    def _annotations(self, path: Path) -> CocoAnnotations:
        if path not in self._opened:
            self._opened[path] = CocoAnnotations(path)
        return self._opened[path]

    # classes

    def _labels(self, annotations: CocoAnnotations) -> dict[int, int]:
        """From the ids of the chosen categories to labels."""
        names = {entry["name"]: entry["id"] for entry in annotations.categories}
        unknown = sorted(set(self.classes or ()) - set(names))
        if unknown:
            raise ValueError(
                f"classes: {annotations.path} has no category {', '.join(unknown)}; it has "
                f"{', '.join(names)}."
            )
        ids = sorted(key for name, key in names.items() if self.classes is None or name in self.classes)
        return {key: place if self.contiguous_labels else key for place, key in enumerate(ids)}

    @property
    def _reference(self) -> CocoAnnotations:
        """The annotations that say which classes there are: the first of train, val and test that exist."""
        paths = [self.root / self.instances.format(split=split) for split in self.splits.values()]
        path = next((path for path in paths if path.is_file()), paths[0])
        self.require(path)
        return self._annotations(path)

    @property
    def category_ids(self) -> list[int]:
        """The COCO id of each label; -1 for labels that no category has."""
        labels = self._labels(self._reference)
        ids = dict(zip(labels.values(), labels, strict=True))
        return [ids.get(label, -1) for label in range(max(ids) + 1)]

    @property
    def class_names(self) -> list[str]:
        """The name of each label; `no class` for labels that no category has."""
        names = {entry["id"]: entry["name"] for entry in self._reference.categories}
        return [names.get(key, "no class") for key in self.category_ids]

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return len(self.category_ids)

    # batches

    def transform(self, split: Split) -> Callable[[Any], Any]:
        """The recipe's transform of training or of evaluation."""
        return self.transforms.train() if split == "train" else self.transforms.evaluation()

    def collation(self) -> Callable[[list[Any]], Any]:
        """Pads and stacks."""
        return collate_detection
