"""Images without labels, to predict on."""

import glob
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules.base import VisionDataModule
from datamodules.imagenet import ImageFileDataset
from datamodules.reading import IMAGE_SUFFIXES
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
        names = self._names()
        if not names:
            raise FileNotFoundError(f"ImagesDataModule: no images in {self.root}. Expected: {self.layout}.")
        self.datasets["predict"] = ImageFileDataset(Path(), names, with_path=True)

    def _names(self) -> list[str]:
        if self.root.is_file():
            return [str(self.root)]
        if self.root.is_dir():
            found = [str(path) for path in self.root.rglob("*")]
        elif glob.has_magic(str(self.root)):
            found = glob.glob(str(self.root), recursive=True)
        else:
            self.require(self.root)
        return sorted(
            name for name in found if Path(name).suffix.lower() in IMAGE_SUFFIXES and Path(name).is_file()
        )
