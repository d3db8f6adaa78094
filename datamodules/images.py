"""Images without labels, to predict on."""

import glob
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules.base import VisionDataModule
from datamodules.imagenet import ImageFileDataset
from datamodules.reading import Listing, list_glob, list_images
from datamodules.samples.imagenet import write_pictures


class ImagesDataModule(VisionDataModule):
    """Image files to predict on: a folder with all that is in it, a glob, or one file.

    Batches have "image", "index" and "path", and no labels.

    Args:
        num_classes: of the model that predicts, for whoever asks the data for it.
        options: of ``VisionDataModule``; ``root`` is the folder, the glob (``photos/**/*.jpg``) or the file.

    Raises:
        FileNotFoundError: in ``setup``, when nothing is there.
        MisconfigurationException: for any use but ``predict``.
    """

    layout: ClassVar[str] = "image files, also in folders; or root is a glob, or one file"

    def __init__(self, *, num_classes: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        """As given.

        Raises:
            MisconfigurationException: when it was not given, as images alone have no classes.
        """
        if self._num_classes is None:
            raise MisconfigurationException(
                "ImagesDataModule: images have no labels; set num_classes to the model's."
            )
        return self._num_classes

    def write_sample(self) -> None:
        """Writes a dozen procedural pictures."""
        write_pictures(self.root)

    def setup(self, stage: str) -> None:
        """Lists the files.

        Raises:
            MisconfigurationException: when ``stage`` is not "predict".
            FileNotFoundError: when there are no images.
        """
        if stage != "predict":
            raise MisconfigurationException(
                f"ImagesDataModule has no labels, so it can only predict, not {stage}. "
                "For images in class folders there is ImageFolderDataModule."
            )
        listing = self._listing()
        if not listing.names:
            raise FileNotFoundError(
                f"ImagesDataModule: no images in {self.root}{listing.left_out()}. Expected: {self.layout}."
            )
        self.announce("predict", f"{len(listing.names)} images", self.root, listing)
        self.datasets["predict"] = ImageFileDataset(Path(), listing.names, with_path=True)

    def _listing(self) -> Listing:
        """Paths, not names; a file that is named itself is taken whatever its name."""
        if self.root.is_file():
            return Listing([str(self.root)])
        if self.root.is_dir():
            listing = list_images(self.root)
            return listing._replace(names=[str(self.root / name) for name in listing.names])
        if not glob.has_magic(str(self.root)):
            self.require(self.root)
        return list_glob(str(self.root))
