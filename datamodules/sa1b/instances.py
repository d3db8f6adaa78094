"""InstancePromptsDataModule: pictures with instance masks of COCO or LVIS, to evaluate prompts on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from datamodules.base import DataModule, Split
from datamodules.coco import values
from datamodules.coco.annotations import CocoAnnotations
from datamodules.coco.dataset import CocoDataset
from datamodules.coco.segmentation import decode_segmentation, encode_mask
from datamodules.reading import CorruptSampleError, DataError
from datamodules.sa1b.dataset import PictureDataset, PredictionFrame
from datamodules.sa1b.detections import NO_BOXES, Boxes, read_detections
from datamodules.sa1b.frame import collate_frames, framed
from datamodules.samples.sa1b import write_prompted_coco


class InstancePromptsDataModule(DataModule):
    """COCO's or LVIS's instances, or any in that format, with boxes of a detector: for validation and test.

    Batches are dicts: "image", "size", "orig_size", "index", "id", "path" and "picture" as those of
    `SA1BDataModule`; "truth" bool (n, height, width) of each picture's objects, crowds left out; "boxes"
    float32 (k, 4) of each picture, corners (x1, y1, x2, y2) in pixels, with "scores" and "categories",
    places among the sorted ids; and "annotations", the ground truth as COCO's evaluation takes it, crowds
    included, with "image_id" and, of LVIS, "negative" and "not_exhaustive", the categories that the file
    lists for the picture.

    Args:
        image_size: side of the square that the network sees, a multiple of 16.
        images: folder of the pictures, under root. LVIS names its pictures with their folder, `val2017` or
            `train2017`, so there it is `.`.
        instances: annotation file, under root.
        detections: file of boxes in COCO's results format, such as those of ViTDet that the authors publish;
            null prompts with the boxes of the ground truth, each of score 1, and measures masks alone.
        max_images: most pictures, those of the smallest ids; null is all.
        predict_folder: pictures to predict on; null is those of the annotation file.
        batch_size: pictures of a batch.
        sample_size: number of pictures that ``sample: true`` draws; a quarter of them is evaluated on.
        sample_image_size: their shorter side, pixels.
        options: of ``DataModule``.
    """

    layout: ClassVar[str] = "val2017/*.jpg and annotations/instances_val2017.json, or as the options say"

    def __init__(
        self,
        *,
        image_size: int = 1024,
        images: str = "val2017",
        instances: str = "annotations/instances_val2017.json",
        detections: Path | None = None,
        max_images: int | None = None,
        predict_folder: Path | None = None,
        batch_size: int = 1,
        sample_size: int = 40,
        sample_image_size: int = 96,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.image_size = image_size
        self.images = images
        self.instances = instances
        self.detections = detections
        self.max_images = max_images
        self.predict_folder = predict_folder
        self.sample_size = sample_size
        self.sample_image_size = sample_image_size

    def write_sample(self) -> None:
        """Writes drawn scenes and detections."""
        write_prompted_coco(self.root, self.sample_size, self.sample_image_size)

    def setup(self, stage: str) -> None:
        """Opens the annotation file.

        Raises:
            FileNotFoundError: a folder or file is not there.
            DataError: the annotation file or the detections are wrong.
        """
        if stage == "predict" and self.predict_folder is not None:
            pictures = PictureDataset(self.predict_folder)
            self.announce("predict", f"{len(pictures)} pictures", self.predict_folder, pictures.listing)
            self.datasets["predict"] = pictures
            return
        folder, path = self.root / self.images, self.root / self.instances
        self.require(folder)
        self.require(path)
        annotations = CocoAnnotations(path)
        found: Mapping[int | str, Boxes] | None = None
        if self.detections is not None:
            keys = {annotations.image_key(row) for row in range(len(annotations))}
            found = read_detections(Path(self.detections), keys, places_of(annotations))
        dataset = InstanceDataset(folder, annotations, found, self.max_images)
        self.datasets[{"test": "test", "predict": "predict"}.get(stage, "val")] = dataset

    def train_dataloader(self) -> Any:
        """None: this data is for evaluation."""
        raise DataError(
            "InstancePromptsDataModule is for validate, test and predict; train on SA1BDataModule."
        )

    def transform(self, split: Split) -> Callable[[Any], Any]:
        """Pictures in the network's frame."""
        return PredictionFrame(self.image_size) if split == "predict" else InstanceFrame(self.image_size)

    def collation(self) -> Callable[[list[Any]], Any]:
        """Stacks what is of one size."""
        return collate_frames


class InstanceDataset(Dataset[dict[str, Any]]):
    """Pictures with their objects and a detector's boxes.

    Args:
        folder: of the pictures.
        annotations: of them.
        detections: boxes by image id; None takes those of the objects.
        most: pictures, of the smallest ids; None takes all.
    """

    def __init__(
        self,
        folder: Path,
        annotations: CocoAnnotations,
        detections: Mapping[int | str, Boxes] | None,
        most: int | None = None,
    ) -> None:
        labels = {entry["name"]: place for place, entry in enumerate(annotations.categories)}
        self.pictures = CocoDataset(folder, annotations, labels)
        self.annotations = annotations
        self.detections = detections
        order = np.argsort(annotations.images["id"], kind="stable")
        self.rows = order[:most]
        self.federated = read_federated(annotations.path, places_of(annotations))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        picture, path = self.picture(index), self.pictures.path(row)
        key = self.annotations.image_key(row)
        objects = self.annotations.of(row)
        objects = objects[objects["category"] >= 0]
        masks = self._masks(objects, picture.height, picture.width, path)
        categories = objects["category"].astype(np.int64)
        single = [place for place, entry in enumerate(objects) if not entry["crowd"] and masks[place].any()]
        sample = {"index": index, "id": str(key), "path": path, "picture": picture, "image_id": index}
        boxes = self._boxes(key, objects[single], categories[single]).within(picture.height, picture.width)
        negative, not_exhaustive = self.federated.get(key, (None, None))
        return {
            **sample,
            "truth": torch.from_numpy(masks[single]),
            "boxes": torch.from_numpy(boxes.corners),
            "scores": torch.from_numpy(boxes.scores),
            "categories": torch.from_numpy(boxes.categories),
            "annotations": [
                _truth(entry, mask, int(category))
                for entry, mask, category in zip(objects, masks, categories, strict=True)
            ],
            "negative": negative,
            "not_exhaustive": not_exhaustive,
        }

    def picture(self, index: int) -> Image.Image:
        """RGB, as its masks were drawn."""
        return self.pictures.picture(int(self.rows[index]))

    def _boxes(self, key: int | str, objects: NDArray[Any], categories: NDArray[np.int64]) -> Boxes:
        if self.detections is not None:
            return self.detections.get(key, NO_BOXES)
        box = objects["bbox"].reshape(-1, 4)
        corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1).astype(np.float32)
        return Boxes(corners, np.ones(len(box)), categories)

    def _masks(self, objects: NDArray[Any], height: int, width: int, path: str) -> NDArray[np.bool_]:
        masks = np.zeros((len(objects), height, width), np.bool_)
        for place, entry in enumerate(objects):
            try:
                masks[place] = decode_segmentation(self.annotations.segmentation(entry), height, width)
            except (ValueError, RecursionError) as error:
                raise CorruptSampleError(
                    f"{self.annotations.path}: annotations[{entry['entry']}] {error} ({path})"
                ) from error
        return masks


def _truth(entry: Any, mask: NDArray[np.bool_], category: int) -> dict[str, Any]:
    return {
        "segmentation": encode_mask(mask),
        "bbox": entry["bbox"].tolist(),
        "area": float(entry["area"]),
        "iscrowd": int(entry["crowd"]),
        "category_id": category,
    }


class InstanceFrame:
    """Adds the network's view to a picture with objects."""

    def __init__(self, frame: int) -> None:
        self.frame = frame

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with `image`, `size` and `orig_size`."""
        picture = sample["picture"]
        image, size = framed(picture, self.frame, sample["path"])
        return {**sample, "image": image, "size": size, "orig_size": torch.tensor(picture.size[::-1])}


def places_of(annotations: CocoAnnotations) -> dict[int | str, int]:
    """The place of each category by its id."""
    return {values.identifier(entry, "id"): place for place, entry in enumerate(annotations.categories)}


def read_federated(
    path: Path, places: Mapping[int | str, int]
) -> dict[int | str, tuple[list[int], list[int]]]:
    """Categories that LVIS says are not in a picture, and those not fully annotated there, by image id.

    Categories are places among `categories`. Empty for files in COCO's format, which say nothing of it.

    Raises:
        DataError: an entry has no lists of ids.
    """
    content = path.read_bytes()
    if b'"neg_category_ids"' not in content:
        return {}
    found = {}
    for place, entry in enumerate(json.loads(content)["images"]):
        lists = [entry.get(name) for name in ("neg_category_ids", "not_exhaustive_category_ids")]
        if not all(
            isinstance(ids, list) and all(isinstance(k, int) and k in places for k in ids) for ids in lists
        ):
            raise DataError(
                f"{path}: images[{place}] has no lists of known ids neg_category_ids and "
                "not_exhaustive_category_ids."
            )
        negative, not_exhaustive = ([places[key] for key in ids] for ids in lists)
        found[values.identifier(entry, "id")] = (negative, not_exhaustive)
    return found
