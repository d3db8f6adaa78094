"""SA-1B from tars and folders: what is read, what is drawn from it, and what is refused in a sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from datamodules import SA1BDataModule
from datamodules.loading import default_ranks
from datamodules.reading import CorruptSampleError, DataError
from datamodules.sa1b.frame import frame_size, low_resolution
from datamodules.sa1b.pairs import parse_notes
from tests.fuzzing import fuzz, outcome


def module(root, **options):
    settings = {
        "image_size": 64,
        "masks_per_image": 4,
        "val_fraction": 0.25,
        "batch_size": 2,
        "num_workers": 0,
    }
    return SA1BDataModule(root=root, **{**settings, **options})


def opened(root, stage="fit", **options):
    data = module(root, **options)
    data.setup(stage)
    return data


def test_tars_and_folders_hold_the_same(tars, folder):
    first, second = (opened(root).datasets["train"] for root in (tars, folder))
    assert len(first) == len(second) > 4
    keys = {sample.key: sample for sample in map(first.__getitem__, range(len(first)))}
    for sample in map(second.__getitem__, range(len(second))):
        other = keys[sample.key]
        assert np.array_equal(np.asarray(sample.picture), np.asarray(other.picture))
        assert sample.notes.annotations == other.notes.annotations
        assert sample.key == f"sa_{sample.notes.image_id}"


def test_a_batch(tars):
    data = opened(tars)
    batches = list(data.train_dataloader())
    for batch in batches:
        assert batch["image"].shape == (2, 3, 64, 64)
        assert batch["image"].dtype == torch.float32
        assert batch["masks"].shape == (8, 16, 16)
        assert batch["masks"].dtype == torch.bool
        assert batch["masks"].flatten(1).any(dim=1).all()
        assert batch["owner"].tolist() == [0] * 4 + [1] * 4
        for image, (height, width) in zip(batch["image"], batch["size"].tolist(), strict=True):
            assert max(height, width) == 64
            assert image[:, :height, :width].any(dim=0).float().mean() > 0.9
            assert image[:, height:].sum() == image[:, :, width:].sum() == 0
    seen = [key for batch in batches for key in batch["id"]]
    assert len(set(seen)) == len(seen)


def test_evaluation_has_masks_as_they_are(tars):
    data = opened(tars, "validate", val_masks=2)
    batch = next(iter(data.val_dataloader()))
    height, width = batch["orig_size"][0].tolist()
    assert batch["truth"][0].shape == (2, height, width)
    assert batch["picture"][0].size == (width, height)
    notes = data.datasets["val"][int(batch["index"])].notes
    expected = coco_mask.decode(notes.annotations[0]["segmentation"])
    assert np.array_equal(batch["truth"][0][0].numpy(), expected)


def test_the_sample_is_what_its_json_says(folder):
    """pycocotools, which counts every number but 0 as 1, reads the masks; boxes and areas are theirs."""
    for path in sorted(folder.glob("*.json"))[:4]:
        if path.name == "sample.json":
            continue
        content = json.loads(path.read_text())
        assert content["image"]["file_name"] == path.with_suffix(".jpg").name
        for entry in content["annotations"]:
            mask = coco_mask.decode(entry["segmentation"])
            assert int(mask.sum()) == entry["area"]
            assert coco_mask.toBbox(entry["segmentation"]).tolist() == entry["bbox"]
            x, y = entry["point_coords"][0]
            assert mask[int(y), int(x)] == 1


def test_splits_are_disjoint_and_of_the_id(tars, folder):
    keys = []
    for root in (tars, folder):
        data = opened(root)
        train, val = (
            {data.datasets[s][i].key for i in range(len(data.datasets[s]))} for s in ("train", "val")
        )
        assert not train & val
        keys.append((train, val))
    assert keys[0] == keys[1]


def test_ids_and_fraction(folder, tmp_path):
    every = sorted(path.stem for path in folder.glob("*.jpg"))
    (tmp_path / "ids.txt").write_text(f"{every[2]}\n{every[5]}.jpg\n\n")
    data = opened(folder, ids=tmp_path / "ids.txt", val_fraction=0)
    assert [data.datasets["train"][i].key for i in range(2)] == [every[2], every[5]]
    data = opened(folder, fraction=0.5, val_fraction=0)
    assert [data.datasets["train"][i].key for i in range(6)] == every[:6]
    (tmp_path / "ids.txt").write_text("sa_1\n")
    with pytest.raises(DataError, match=r"ids\.txt names sa_1, and .* has none"):
        opened(folder, ids=tmp_path / "ids.txt")


def test_ranks_share_an_epoch(tars):
    data = opened(tars, batch_size=1)
    dataset = data.datasets["train"]
    seen = []
    for rank in range(2):
        data._ranks = lambda rank=rank: (rank, 2)
        seen.append([index for _, index in data.sampler(dataset, "train")])
    assert len(seen[0]) == len(seen[1]) == len(dataset) // 2
    assert not set(seen[0]) & set(seen[1])
    assert default_ranks() == (0, 1)


def test_draws_are_of_seed_and_epoch(tars):
    first, second = (next(iter(opened(tars, num_workers=n, seed=3).train_dataloader())) for n in (0, 1))
    assert torch.equal(first["masks"], second["masks"])
    assert first["id"] == second["id"]


def test_few_masks_are_drawn_again(folder):
    data = opened(folder, masks_per_image=40, batch_size=1)
    batch = next(iter(data.train_dataloader()))
    assert len(batch["masks"]) == 40
    assert len(batch["masks"].unique(dim=0)) < 12


def test_low_resolution_masks():
    """Resized and padded as the picture is, then averaged."""
    mask = np.zeros((20, 40), bool)
    mask[5:15, 10:30] = True
    small = low_resolution(mask, 64)
    assert small.shape == (16, 16)
    assert small[8:].sum() == 0  # padding
    assert small[2:6, 4:12].all()
    assert small.sum() == 32
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((64, 32), Image.Resampling.BILINEAR)
    mean = np.asarray(grey, float).reshape(8, 4, 16, 4).mean(axis=(1, 3))
    assert np.array_equal(small[:8], mean > 127.5)
    mask[:] = False
    mask[3, 3] = True
    assert not low_resolution(mask, 64).any()  # a speck vanishes


def test_frame_sizes_round_half_up():
    assert frame_size(427, 640, 1024) == (683, 1024)
    assert frame_size(1, 1, 64) == (64, 64)
    with pytest.raises(ValueError, match="its shorter side vanishes"):
        frame_size(1, 3000, 1024)


# what is wrong


def test_a_mask_that_vanishes_is_drawn_again(pair):
    root, _, change = pair
    speck = np.zeros((48, 48), np.uint8, order="F")

    def specks(content):
        height, width = content["image"]["height"], content["image"]["width"]
        speck = np.zeros((height, width), np.uint8, order="F")
        speck[3, 3] = 1
        runs = coco_mask.encode(speck)
        bad = {"segmentation": {"size": [height, width], "counts": runs["counts"].decode()}}
        content["annotations"] = [content["annotations"][0], *[bad] * 8]

    change(specks)
    batch = next(iter(opened(root, batch_size=1, val_fraction=0).train_dataloader()))
    assert len(batch["masks"]) == 4
    assert len(batch["masks"].unique(dim=0)) == 1
    assert speck.sum() == 0


def test_a_picture_without_masks_gives_none(pair):
    root, _, change = pair
    change(lambda content: content.update(annotations=[]))
    batch = next(iter(opened(root, batch_size=1, val_fraction=0).train_dataloader()))
    assert batch["masks"].shape == (0, 16, 16)
    assert batch["owner"].tolist() == []


def sizes(content):
    return [content["image"]["height"], content["image"]["width"]]


BAD = {
    "counts": (
        lambda c: c["annotations"][0].update(segmentation={"size": sizes(c), "counts": [5, 7]}),
        r"annotations\[0\] has run lengths that add up to 12, but its picture has",
    ),
    "size": (
        lambda c: c["annotations"][0]["segmentation"].update(size=[3, 4]),
        r"annotations\[0\] has run lengths of the size \[3, 4\], but its picture is",
    ),
    "compressed": (
        lambda c: c["annotations"][0]["segmentation"].update(counts="\x01"),
        r"annotations\[0\] has the run lengths .* which are none",
    ),
    "picture": (
        lambda c: c["image"].update(width=5, height=7),
        r"\.jpg is .* pixels, but .*\.json says 5 x 7",
    ),
    "field": (lambda c: c["image"].pop("image_id"), r"\.json: image has no field 'image_id'"),
    "annotations": (
        lambda c: c.update(annotations=None),
        r"\.json has the annotations None; a list of objects",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json(pair, case):
    root, path, change = pair
    edit, message = BAD[case]
    change(edit)
    data = opened(root, batch_size=1, val_fraction=0, masks_per_image=50)
    with pytest.raises(CorruptSampleError, match=message) as caught:
        next(iter(data.train_dataloader()))
    assert path.stem in str(caught.value)
    if case in ("counts", "size", "compressed"):
        assert isinstance(caught.value, ValueError)


def test_a_truncated_picture(pair):
    root, path, _ = pair
    image = path.with_suffix(".jpg")
    image.write_bytes(image.read_bytes()[:300])
    data = opened(root, batch_size=1, val_fraction=0)
    with pytest.raises(CorruptSampleError, match=rf"cannot read the image .*{image.name}"):
        next(iter(data.train_dataloader()))


def test_a_truncated_picture_in_a_tar_is_named(tars, tmp_path):
    path = shutil.copy(sorted(tars.glob("*.tar"))[0], tmp_path)
    content = bytearray((tmp_path / "sa_000000.tar").read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start + 200 : start + 1200] = bytes(1000)
    content[start : start + 3] = b"not"
    (tmp_path / "sa_000000.tar").write_bytes(content)
    data = opened(tmp_path, batch_size=1, val_fraction=0)
    with pytest.raises(CorruptSampleError, match=rf"cannot read the image sa_\d+ in {path}"):
        list(data.train_dataloader())
    data = opened(tmp_path, batch_size=1, val_fraction=0, on_error="skip")
    assert len(list(data.train_dataloader())) == 4  # another one in its place


def test_a_truncated_tar(tars, tmp_path):
    content = sorted(tars.glob("*.tar"))[0].read_bytes()
    (tmp_path / "sa_000000.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"sa_000000\.tar ends within \./sa_\d+\.\w+: get it again"):
        opened(tmp_path)


def test_the_index_of_a_tar_is_kept_until_it_changes(tars, tmp_path, monkeypatch):
    path = tmp_path / "sa_000000.tar"
    shutil.copy(sorted(tars.glob("*.tar"))[0], path)
    first = opened(tmp_path).datasets["train"]
    kept = list((tmp_path / ".index").glob("*.npz"))
    assert len(kept) == 1
    monkeypatch.setattr("datamodules.streaming._index", None)  # not read again
    assert opened(tmp_path).datasets["train"].identity(2) == first.identity(2)
    monkeypatch.undo()
    kept[0].write_bytes(b"damaged")
    assert opened(tmp_path).datasets["train"].identity(2) == first.identity(2)
    shutil.copy(sorted(tars.glob("*.tar"))[1], path)
    assert opened(tmp_path).datasets["train"].identity(2) != first.identity(2)


def test_what_has_no_partner_is_counted(folder, tmp_path):
    for path in folder.glob("sa_*"):
        shutil.copy(path, tmp_path)
    sorted(tmp_path.glob("*.json"))[0].unlink()
    sorted(tmp_path.glob("*.jpg"))[-1].unlink()
    with pytest.warns(UserWarning, match="2 files of .* are a picture without a JSON or the reverse"):
        data = opened(tmp_path)
    assert len(data.datasets["train"]) + len(data.datasets["val"]) == 10
    for path in tmp_path.glob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"no picture \(\.jpg\) has a JSON of its name beside it"):
        opened(tmp_path)


def test_tars_beside_pictures_are_ambiguous(tars, folder, tmp_path):
    shutil.copy(sorted(tars.glob("*.tar"))[0], tmp_path)
    for path in folder.glob("sa_*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(DataError, match=r"has tars, such as .* and pictures, such as .*: set source to"):
        opened(tmp_path)
    assert len(opened(tmp_path, source="tars").datasets["train"]) < 5
    assert len(opened(tmp_path, source="folder").datasets["train"]) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "image_size: a multiple of 16"),
        ({"masks_per_image": 0}, "masks_per_image: at least 1"),
        ({"val_fraction": 1.0}, "val_fraction is at least 0 and below 1"),
    ],
)
def test_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


def test_there_must_be_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opened(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        opened(tmp_path, "predict", predict_folder=tmp_path / "empty")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["image", "annotations", "segmentation", "size", "counts", "height", "width", "image_id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@fuzz(50)
@given(JSON)
def test_any_json_is_read_or_refused(content):
    text = json.dumps(content).encode()

    def read():
        notes = parse_notes(text, "sa_1.json")
        return [
            notes.mask(place) for place in range(len(notes.annotations)) if notes.height * notes.width < 10**6
        ]

    outcome(read, "sa_1.json")
