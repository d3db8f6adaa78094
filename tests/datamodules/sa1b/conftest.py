import json

import pytest

from datamodules.samples.sa1b import write_prompted_coco, write_sa1b


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    """Twelve drawn scenes in three tars."""
    root = tmp_path_factory.mktemp("sa1b") / "tars"
    write_sa1b(root, size=12, image_size=48, tars=3)
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The same scenes, extracted."""
    root = tmp_path_factory.mktemp("sa1b") / "folder"
    write_sa1b(root, size=12, image_size=48, tars=0)
    return root


@pytest.fixture
def pair(folder, tmp_path):
    """A folder with one pair that a test may damage, its JSON, and how to change that."""
    image = sorted(folder.glob("*.jpg"))[0]
    root = tmp_path / "pair"
    root.mkdir()
    (root / image.name).write_bytes(image.read_bytes())
    path = root / image.with_suffix(".json").name
    content = json.loads(image.with_suffix(".json").read_text())
    path.write_text(json.dumps(content))

    def change(edit):
        edit(content)
        path.write_text(json.dumps(content))

    return root, path, change


@pytest.fixture(scope="session")
def instances(tmp_path_factory):
    """Two drawn scenes to evaluate on in COCO's layout, with detections."""
    root = tmp_path_factory.mktemp("instances") / "coco"
    write_prompted_coco(root, size=8, image_size=48)
    return root
