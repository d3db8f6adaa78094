from pathlib import Path

import pytest

from datamodules.samples import write_cifar, write_image_folders


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of 60 training and 15 test images of 5 classes in CIFAR-100's files."""
    root = tmp_path_factory.mktemp("cifar")
    write_cifar(root, size=60, num_classes=5)
    return root


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of 12 training and 3 validation JPEGs of 3 classes in class folders."""
    root = tmp_path_factory.mktemp("folders") / "images"
    write_image_folders(root, size=12, num_classes=3, image_size=24)
    return root
