"""Samples of a COCO data set, and of a folder of pictures to predict on."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.coco.annotations import CAPTION, IGNORED, CocoAnnotations
from datamodules.coco.segmentation import decode_segmentation
from datamodules.reading import CorruptSampleError, as_stored, list_images, read_image


class Census(NamedTuple):
    """What a split has to offer, by its annotation file alone."""

    objects: int
    crowds: int
    empty: int
    """Boxes without area or outside of their picture: neither training nor evaluation sees them."""
    reaching: int
    """Boxes that reach more than a pixel out of their picture."""
    other: int
    """Of categories that are not used."""
    ignored: int
    """Of the category -1."""
    short: int
    """Parts of polygons with fewer than three points."""
    shapeless: int
    """Objects without an outline."""


class CocoDataset(Dataset[dict[str, Any]]):
    """Images with their objects, read when asked for.

    Samples: `image` (Pillow's, RGB), `boxes` (n, 4) float32 pixel corners clipped to the image, `labels`
    (n,) int64, `orig_size` (2,) as height and width, `image_id`, `index`, `path`; if asked for, `masks`
    (n, H, W) bool, `captions` (strings), and `annotations`, the ground truth for COCO's evaluation as
    dictionaries of `bbox` (x, y, w, h), `area`, `iscrowd` and `category_id` (the label). Crowds are only in
    the last, boxes without area or outside of the image in neither. Boxes and masks are torchvision's
    tv_tensors.

    Args:
        folder: of the images.
        annotations: of them.
        labels: of the categories' names; other categories are left out.
        masks: add the objects' masks.
        truth: add `annotations`.
        captions: annotations to take captions from, for the same images.
    """

    def __init__(
        self,
        folder: Path,
        annotations: CocoAnnotations,
        labels: Mapping[str, int],
        masks: bool = False,
        truth: bool = False,
        captions: CocoAnnotations | None = None,
    ) -> None:
        self.folder = folder
        self.annotations = annotations
        self.masks = masks
        self.truth = truth
        self.captions = captions
        self._climbing = frozenset(annotations.climbing)
        self._caption_rows: dict[int | str, int] | None = None
        self.relabel(labels)

    def relabel(self, labels: Mapping[str, int]) -> None:
        """Use other labels of the categories' names."""
        found = [labels.get(entry["name"], -1) for entry in self.annotations.categories]
        self._labels = np.array([*found, -1, -1])  # by the categories' places; then `IGNORED`, `CAPTION`

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.picture(index)
        found = self.annotations.of(index)
        labels = self._labels[found["category"]]
        corners = _clipped_corners(found["bbox"], image.width, image.height)
        seen = (labels >= 0) & _has_area(corners)
        kept = seen & ~found["crowd"]
        sample: dict[str, Any] = {
            "image": image,
            "index": index,
            "path": self.path(index),
            "image_id": int(self.annotations.images[index]["id"]),
            **_objects(corners[kept], labels[kept], image.size),
        }
        if self.masks:
            sample["masks"] = self._masks(index, found[kept], image.height, image.width)
        if self.truth:
            sample["annotations"] = [
                _truth(annotation, int(label))
                for annotation, label in zip(found[seen], labels[seen], strict=True)
            ]
        if self.captions is not None:
            sample["captions"] = self._captions(self.captions, self.annotations.image_key(index))
        return sample

    # files

    def path(self, index: int) -> str:
        """Of an image's file."""
        name = self.annotations.file_name(index)
        path = os.path.join(self.folder, name)
        if "\\" in name and not os.path.lexists(path):  # written on Windows
            path = os.path.join(self.folder, name.replace("\\", "/"))
        # a `..` behind a link would lead to where the link leads
        return os.path.normpath(path) if index in self._climbing else path

    def outside(self, root: Path) -> list[int]:
        """Images whose file name leads out of `root` and out of their folder; links in them lead anywhere."""
        bases = [
            function(base) for base in (root, self.folder) for function in (os.path.abspath, os.path.realpath)
        ]
        starts = tuple(os.path.join(base, "") for base in bases)
        return [
            row for row in self.annotations.climbing if not os.path.abspath(self.path(row)).startswith(starts)
        ]

    def picture(self, index: int) -> Image.Image:
        """An image as its boxes were drawn: upright, or as it is stored where the annotated size says so.

        Raises:
            CorruptSampleError: it cannot be read, or has another size than the annotation file says.
        """
        path, entry = self.path(index), self.annotations.images[index]
        image = read_image(path)
        size = int(entry["width"]), int(entry["height"])
        if 0 in size or image.size == size:
            return image
        if image.size == size[::-1]:
            image = as_stored(image, path)
            if image.size == size:
                return image
        raise CorruptSampleError(
            f"{path} is {image.width} x {image.height} pixels, but {self.annotations.path} says "
            f"{size[0]} x {size[1]} (images[{index}]), so its boxes do not fit"
        )

    def entry(self, index: int) -> dict[str, Any]:
        """`image_id` and `file_name` of an image, as the annotation file writes them."""
        return {"image_id": self.annotations.image_id(index), "file_name": self.annotations.file_name(index)}

    # annotations

    def census(self) -> Census:
        """Counts of the whole split."""
        images, objects = self.annotations.images, self.annotations.objects
        size = np.stack([images["width"], images["height"]], axis=1).astype(np.float64)
        limits = np.repeat(
            np.where(size.min(axis=1, keepdims=True) > 0, size, np.inf), images["count"], axis=0
        )
        boxes, crowd = objects["bbox"], objects["crowd"]
        used = self._labels[objects["category"]] >= 0
        seen = used & _has_area(_clipped_corners(boxes, limits[:, 0], limits[:, 1]))
        kept = seen & ~crowd
        beyond = (boxes[:, :2] < -1) | (boxes[:, :2] + boxes[:, 2:] > limits + 1)
        shapeless = objects["text"][:, 0] == objects["text"][:, 1]
        masks = (
            kept.sum(),
            (seen & crowd).sum(),
            (used & ~seen).sum(),
            (seen & beyond.any(axis=1)).sum(),
            (~used & (objects["category"] >= 0)).sum(),
            (objects["category"] == IGNORED).sum(),
            objects["short"][kept].sum(),
            (kept & shapeless).sum(),
        )
        return Census(*map(int, masks))

    def _masks(self, index: int, annotations: NDArray[Any], height: int, width: int) -> Tensor:
        from torchvision.tv_tensors import Mask

        masks = np.zeros((len(annotations), height, width), np.bool_)
        for row, annotation in enumerate(annotations):
            try:
                masks[row] = decode_segmentation(self.annotations.segmentation(annotation), height, width)
            except (ValueError, RecursionError) as error:
                raise CorruptSampleError(
                    f"{self.annotations.path}: annotations[{annotation['entry']}] {error} "
                    f"({self.path(index)})"
                ) from error
        return Mask(torch.from_numpy(masks))

    def _captions(self, captions: CocoAnnotations, key: int | str) -> list[str]:
        if self._caption_rows is None:
            self._caption_rows = {captions.image_key(row): row for row in range(len(captions))}
        row = self._caption_rows.get(key)
        if row is None:
            return []
        entries = captions.of(row)
        return [captions.caption(entry) for entry in entries if entry["category"] == CAPTION]


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
        self.listing = list_images(folder)
        self.names = self.listing.names
        if not self.names:
            left_out = self.listing.left_out()
            raise FileNotFoundError(f"predict_folder: there are no images in {folder}{left_out}.")
        stems = [Path(name).stem for name in self.names]
        numbers = {int(stem) for stem in stems if stem.isdecimal()}
        numbered = len(numbers) == len(stems) and max(numbers) < 2**63
        self.ids = [int(stem) for stem in stems] if numbered else list(range(len(stems)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.picture(index)
        known = {"image": image, "index": index, "path": self.path(index), "image_id": self.ids[index]}
        return {**known, **_objects(np.zeros((0, 4)), np.zeros(0), image.size)}

    def path(self, index: int) -> str:
        """Of a picture's file."""
        return str(self.folder / self.names[index])

    def picture(self, index: int) -> Image.Image:
        """A picture, upright.

        Raises:
            CorruptSampleError: it cannot be read.
        """
        return read_image(self.path(index))

    def entry(self, index: int) -> dict[str, Any]:
        """`image_id`, and `file_name` in the folder."""
        return {"image_id": self.ids[index], "file_name": self.names[index]}


def _truth(annotation: Any, label: int) -> dict[str, Any]:
    return {
        "bbox": annotation["bbox"].tolist(),
        "area": float(annotation["area"]),
        "iscrowd": int(annotation["crowd"]),
        "category_id": label,
    }


def _objects(boxes: NDArray[Any], labels: NDArray[Any], size: tuple[int, int]) -> dict[str, Any]:
    """`boxes`, `labels` and `orig_size` of an image of `size` (width, height)."""
    from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

    canvas = (size[1], size[0])
    corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    kind = BoundingBoxFormat.XYXY
    return {
        "boxes": BoundingBoxes(corners, format=kind, canvas_size=canvas),
        "labels": torch.as_tensor(labels, dtype=torch.int64),
        "orig_size": torch.tensor(canvas),
    }


def _clipped_corners(boxes: NDArray[np.float64], width: Any, height: Any) -> NDArray[np.float32]:
    """(n, 4) as x, y, w, h to corners within the image."""
    limits = np.stack(np.broadcast_arrays(width, height, width, height), axis=-1)
    with np.errstate(over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        return corners.clip(0, limits).astype(np.float32)


def _has_area(corners: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])


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
