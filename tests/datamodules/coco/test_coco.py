"""CocoDataModule: published layout, the two recipes against recorded numbers, lazy annotations, faults."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.ops import box_area
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from datamodules.coco.annotations import CocoAnnotations
from datamodules.coco.dataset import collate_detection
from datamodules.coco.module import CocoDataModule
from datamodules.coco.segmentation import decode_segmentation
from datamodules.coco.transforms import (
    DecoPlusTransforms,
    DecoTransforms,
    crop,
    random_crop,
    resize_short_side,
    short_side_size,
)
from datamodules.samples.coco import CATEGORIES, SceneStyle, draw_scene, write_coco

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "deco.json").read_text())["cases"]
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A sample of drawn scenes."""
    folder = tmp_path_factory.mktemp("drawn") / "coco"
    write_coco(folder, size=24, image_size=64)
    return folder


def module(root, **options) -> CocoDataModule:
    defaults = {"transforms": small(), "batch_size": 4, "num_workers": 0, "seed": 0}
    return CocoDataModule(root=root, **{**defaults, **options})


def small(**options) -> DecoTransforms:
    sizes = {"train_sides": [48, 64], "crop_sides": [56, 64], "crop_range": (32, 48)}
    return DecoTransforms(**{"short_side": 64, "max_size": 96, **sizes, **options})


def sample_of(width: int, height: int, boxes: list[list[float]], seed: int = 1) -> dict:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "image": Image.fromarray(pixels),
        "boxes": BoundingBoxes(corners, format=BoundingBoxFormat.XYXY, canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
        "index": 0,
        "path": "",
        "image_id": 1,
        "orig_size": torch.tensor([height, width]),
    }


# The recorded numbers


def test_resize_rule_is_the_recorded_one():
    for case in GOLDEN["resize_sizes"]:
        size = short_side_size(case["w"], case["h"], case["size"], case["max_size"])
        assert list(size) == case["out_hw"]
        sample = sample_of(case["w"], case["h"], [[10, 20, 50, 60]])
        resized = resize_short_side(sample, case["size"], case["max_size"])
        assert resized["image"].size == (size[1], size[0])
        np.testing.assert_allclose(resized["boxes"][0].numpy(), case["box"], rtol=1e-5)


def test_flip_and_crop_are_the_recorded_ones():
    case = GOLDEN["box_transforms"]
    sample = sample_of(*case["wh"], case["boxes"])
    assert functional.horizontal_flip(sample["boxes"]).tolist() == case["hflip"]
    cut = crop(sample, *case["crop_region_ijhw"])
    assert cut["boxes"].tolist() == case["crop_boxes"]
    assert cut["labels"].tolist() == case["crop_labels"]
    assert box_area(cut["boxes"]).tolist() == case["crop_area"]
    assert cut["image"].size == (case["crop_region_ijhw"][3], case["crop_region_ijhw"][2])


def test_pixels_are_the_recorded_ones():
    def check(image: torch.Tensor, record: dict) -> None:
        values = image.double().flatten().numpy()
        assert list(image.shape) == record["shape"]
        np.testing.assert_allclose(values[record["idx"]], record["at"], atol=1e-2)
        np.testing.assert_allclose(values[:8], record["first8"], atol=1e-2)
        assert values.mean() == pytest.approx(record["mean"], abs=1e-3)
        assert values.std() == pytest.approx(record["std"], abs=1e-3)

    case = GOLDEN["pixels_deco"]
    recipe = DecoTransforms(short_side=case["size"], max_size=case["max_size"]).evaluation()
    pixels = recipe(sample_of(case["w"], case["h"], [], case["seed"]))["image"]
    check((pixels / 255 - MEAN) / STD, case["output"])
    case = GOLDEN["pixels_decoplus"]
    recipe = DecoPlusTransforms(side=case["size"][0]).evaluation()
    check(recipe(sample_of(case["w"], case["h"], [], case["seed"]))["image"] / 255, case["output"])


# The recipes


def test_training_sides_are_drawn_from_the_list_with_and_without_a_crop():
    recipe = DecoTransforms().train()
    sample = sample_of(640, 480, [[100, 100, 500, 400]])
    sides, cropped = set(), 0
    for seed in range(40):
        torch.manual_seed(seed)
        found = recipe(sample)
        height, width = found["size"].tolist()
        sides.add(min(height, width))
        cropped += abs(max(height, width) / min(height, width) - 4 / 3) > 0.02
        assert max(height, width) <= 1333
        assert found["image"].shape == (3, height, width)
        assert found["image"].dtype == torch.uint8
    assert sides <= set(range(480, 801, 32))
    assert len(sides) > 5
    assert 8 < cropped < 32


def test_random_crops_stay_in_their_range():
    sample = sample_of(60, 50, [[0, 0, 60, 50]])
    for seed in range(20):
        torch.manual_seed(seed)
        width, height = random_crop(sample, 20, 40)["image"].size
        assert 20 <= width <= 40
        assert 20 <= height <= 40
    width, height = random_crop(sample, 384, 600)["image"].size  # smaller than the least: as it is
    assert (width, height) == (60, 50)


def test_boxes_follow_the_picture_through_the_recipes():
    """A bright rectangle on black: wherever it goes, its box is around its pixels."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[30:70, 40:110] = 255
    sample = {**sample_of(160, 120, [[40, 30, 110, 70]]), "image": Image.fromarray(pixels)}
    sample["masks"] = Mask(torch.from_numpy(pixels[None, ..., 0] > 0))
    deco = DecoTransforms(96, 160, [64, 96], crop_sides=[80, 96], crop_range=(48, 72))
    plus = DecoPlusTransforms(side=96, distort=0.0)
    checked = 0
    for seed in range(30):
        for recipe in (deco, plus):
            torch.manual_seed(seed)
            found = recipe.train()(sample)
            if len(found["boxes"]) == 0:
                continue
            lit = found["image"][0] > 127
            rows, columns = lit.any(dim=1).nonzero().flatten(), lit.any(dim=0).nonzero().flatten()
            around = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
            assert found["boxes"][0].tolist() == pytest.approx(around, abs=1.6)
            assert found["masks"].shape[-2:] == found["image"].shape[-2:]
            assert (found["masks"][0].bool() ^ lit).float().mean() < 0.03
            checked += 1
    assert checked > 50


def test_images_without_objects_go_through_every_recipe():
    for recipe in (small(), DecoPlusTransforms(side=64)):
        for seed in range(8):
            torch.manual_seed(seed)
            found = recipe.train()(sample_of(80, 70, []))
            assert found["boxes"].shape == (0, 4)
            assert found["labels"].shape == (0,)


def test_without_augmentation_training_is_evaluation():
    sample = sample_of(80, 70, [[1, 2, 30, 40]])
    for recipe in (small(augmentation=False), DecoPlusTransforms(side=64, augmentation=False)):
        one, two = recipe.train()(sample), recipe.evaluation()(sample)
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["boxes"], two["boxes"])


# Batches


def test_padding_is_black_below_and_right_and_marked():
    samples = [small().evaluation()(sample_of(*size, [[0, 0, 10, 10]])) for size in ((80, 64), (64, 90))]
    batch = collate_detection(samples)
    assert batch["image"].shape == (2, 3, 90, 80)
    assert batch["mask"].shape == (2, 90, 80)
    assert batch["image"].dtype == torch.float32
    assert not batch["mask"][0, :64].any()
    assert batch["mask"][0, 64:].all()
    assert batch["mask"][1, :, 64:].all()
    assert batch["image"][0, :, 64:].abs().max() == 0
    assert torch.equal(batch["image"][1, :, :, :64] * 255, samples[1]["image"].float())


def test_batches_have_what_is_promised(root):
    data = module(root, masks=True, captions="annotations/captions_{split}.json")
    data.setup("fit")
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert set(train) == {"image", "mask", "targets", "index", "path", "captions"}
    assert set(val) == {*train, "annotations"}
    target = train["targets"][0]
    count, (height, width) = len(target["labels"]), target["size"].tolist()
    assert target["boxes"].shape == (count, 4)
    assert target["masks"].shape == (count, height, width)
    assert type(target["boxes"]) is torch.Tensor
    assert 0 <= train["image"].min() < train["image"].max() <= 1
    assert len(train["captions"][0]) == 5
    assert Path(train["path"][0]).is_file()


def test_the_same_seed_gives_the_same_batches_whoever_reads(root):
    def first(workers: int):
        data = module(root, num_workers=workers, persistent_workers=False)
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    one, two = first(0), first(1)
    assert torch.equal(one["image"], two["image"])
    assert all(
        torch.equal(a["boxes"], b["boxes"]) for a, b in zip(one["targets"], two["targets"], strict=True)
    )


# Annotations


def test_everything_agrees_with_pycocotools(root):
    data = module(root)
    data.setup("fit")
    reference = COCO(str(root / "annotations" / "instances_train2017.json"))
    dataset = data.datasets["train"]
    assert [int(key) for key in dataset.annotations.images["id"]] == list(reference.imgs)
    crowds = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        image = reference.imgs[sample["image_id"]]
        assert Path(sample["path"]).name == image["file_name"]
        assert sample["orig_size"].tolist() == [image["height"], image["width"]]
        truth = reference.imgToAnns[sample["image_id"]]
        crowds += sum(entry["iscrowd"] for entry in truth)
        wanted = [entry for entry in truth if not entry["iscrowd"]]
        assert sample["labels"].tolist() == [entry["category_id"] for entry in wanted]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in wanted)]
        assert sample["boxes"].tolist() == corners
        rows = dataset.annotations.of(index)
        assert rows["bbox"].tolist() == [entry["bbox"] for entry in truth]
        assert rows["area"].tolist() == [entry["area"] for entry in truth]
        for row, entry in zip(rows, truth, strict=True):
            shape = dataset.annotations.segmentation(row)
            mask = decode_segmentation(shape, image["height"], image["width"])
            assert (mask == reference.annToMask(entry)).all()
    assert crowds > 0


def test_evaluation_sees_the_crowds_and_training_does_not(root):
    data = module(root, val_split="train2017")
    data.setup("fit")
    seen = [data.datasets["val"][index] for index in range(24)]
    crowds = sum(entry["iscrowd"] for sample in seen for entry in sample["annotations"])
    objects = sum(len(sample["labels"]) for sample in seen)
    assert crowds > 0
    assert sum(len(sample["annotations"]) for sample in seen) == objects + crowds


def test_labels_are_ids_or_places_and_classes_can_be_chosen(root):
    raw, places = module(root), module(root, contiguous_labels=True)
    assert raw.category_ids == [-1, 1, 2, -1, 4, -1, 6, 7, -1, 9]
    assert raw.num_classes == 10
    assert raw.class_names[1:3] == ["circle", "square"]
    assert raw.class_names[3] == "no class"
    assert places.category_ids == list(CATEGORIES)
    assert places.class_names == list(CATEGORIES.values())
    few = module(root, contiguous_labels=True, classes=["star", "moon"])
    few.setup("fit")
    assert few.category_ids == [6, 9]
    labels = {label for index in range(24) for label in few.datasets["train"][index]["labels"].tolist()}
    assert labels == {0, 1}
    with pytest.raises(ValueError, match=r"classes: .*no category person; it has circle"):
        module(root, classes=["person"]).setup("fit")


def test_annotations_are_mapped_and_never_pickled(root):
    data = module(root)
    data.setup("fit")
    annotations = data.datasets["train"].annotations
    assert isinstance(annotations.objects, np.memmap)
    assert isinstance(annotations.images, np.memmap)
    packed = pickle.dumps(data.datasets["train"])
    assert len(packed) < 2000
    assert pickle.loads(packed)[3]["boxes"].tolist() == data.datasets["train"][3]["boxes"].tolist()


def copied(root, tmp_path) -> Path:
    shutil.copytree(root / "annotations", tmp_path / "annotations", ignore=shutil.ignore_patterns(".index"))
    return tmp_path / "annotations" / "instances_val2017.json"


def test_a_changed_file_is_parsed_again(root, tmp_path):
    path = copied(root, tmp_path)
    before = CocoAnnotations(path)
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [1, 2, 3, 4.5]
    path.write_text(json.dumps(content))
    after = CocoAnnotations(path)
    assert before.objects["bbox"].tolist() != after.objects["bbox"].tolist()
    assert [1, 2, 3, 4.5] in after.objects["bbox"].tolist()


def test_where_the_folder_is_closed_the_cache_takes_the_index(root, tmp_path, monkeypatch):
    path = copied(root, tmp_path)
    (path.parent / ".index").write_text("a file in the way of the folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(CocoAnnotations(path)) == 6
    assert list((tmp_path / "cache").rglob("meta.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 1]), "annotation .* bbox .*nan"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, -1, 1]), "negative width"),
        (lambda c: c["annotations"][0].update(image_id=12345), "image 12345, which is not in the file"),
        (lambda c: c["annotations"][0].update(category_id=99), "category 99, which is not"),
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c["images"].append(c["images"][0]), "two images have one id"),
        (lambda c: c["images"][0].pop("file_name"), "has no field 'file_name'"),
        (lambda c: c["annotations"][0].pop("bbox"), "has no field 'bbox'"),
    ],
)
def test_wrong_files_are_named_with_what_is_wrong(change, message, root, tmp_path):
    path = copied(root, tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        CocoAnnotations(path)
    assert str(path) in str(error.value)


def test_what_is_no_json_is_named(tmp_path):
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"cut.json is not JSON"):
        CocoAnnotations(tmp_path / "cut.json")


def test_missing_data_is_named_with_its_remedies(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train2017 does not exist.*sample: true.*download: true"):
        module(tmp_path / "nowhere").setup("fit")


def test_boxes_are_clipped_and_those_without_area_dropped(root, tmp_path):
    shutil.copytree(root, tmp_path / "coco", ignore=shutil.ignore_patterns(".index"))
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    image = content["images"][0]
    made = [[-5.0, -5.0, 20.0, 20.0], [3.0, 3.0, 0.0, 5.0], [500.0, 1.0, 9.0, 9.0], [5.0, 5.0, 900.0, 900.0]]
    content["annotations"] = [
        {"id": n, "image_id": image["id"], "category_id": 1, "bbox": box, "area": 1.0, "iscrowd": 0}
        for n, box in enumerate(made, 1)
    ]
    path.write_text(json.dumps(content))
    data = module(tmp_path / "coco")
    data.setup("validate")
    boxes = data.datasets["val"][0]["boxes"]
    assert boxes.tolist() == [[0, 0, 15, 15], [5, 5, image["width"], image["height"]]]


# Predicting


def test_any_folder_can_be_predicted_on(root, tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = module(root, predict_folder=tmp_path)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert [Path(path).name for path in batch["path"]] == ["a.jpg", "b.png"]
    assert [target["image_id"].item() for target in batch["targets"]] == [0, 1]
    assert batch["targets"][0]["orig_size"].tolist() == [30, 40]
    with pytest.raises(FileNotFoundError, match="predict_folder"):
        module(root, predict_folder=tmp_path / "none").setup("predict")


def test_cocos_own_file_names_are_image_ids(root):
    data = module(root, predict_folder=root / "val2017")
    data.setup("predict")
    found = [target["image_id"].item() for batch in data.predict_dataloader() for target in batch["targets"]]
    assert found == [1_000_001 + 37 * place for place in range(6)]


# The sample


def test_the_sample_is_cocos_layout(root):
    for split, count in (("train2017", 24), ("val2017", 6)):
        assert len(list((root / split).glob("[0-9]" * 12 + ".jpg"))) == count
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
        captions = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
        assert len(captions["annotations"]) == 5 * count


def test_scenes_have_what_a_detector_must_cope_with():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(64, 80, rng) for _ in range(60)]
    kinds = {entry["category_id"] for scene in scenes for entry in scene.annotations}
    assert kinds == set(CATEGORIES)
    entries = [(scene, entry) for scene in scenes for entry in scene.annotations]
    assert any(entry["iscrowd"] for _, entry in entries)
    assert draw_scene(64, 80, rng, empty=True).annotations == []
    split = 0
    for scene, entry in entries:
        height, width = scene.picture.shape[:2]
        mask = decode_segmentation(entry["segmentation"], height, width)
        assert mask.sum() == pytest.approx(entry["area"], rel=0.15)
        lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert coco_mask.toBbox(lengths).tolist() == pytest.approx(entry["bbox"], abs=1.01)
        split += not entry["iscrowd"] and len(entry["segmentation"]) > 1
    assert split > 0, "no object is cut in two by another"


def test_the_same_seed_draws_the_same_scene():
    one, two = (draw_scene(40, 50, np.random.default_rng(3)) for _ in range(2))
    assert (one.picture == two.picture).all()
    assert one.annotations == two.annotations


def test_easy_scenes_are_large_shapes_of_one_category(tmp_path):
    style = SceneStyle(most=1, radii=(0.2, 0.3), crowds=0.0, longest=1.0, named=False)
    module = CocoDataModule(
        root=tmp_path / "coco", sample=True, sample_size=8, sample_image_size=64, sample_style=style
    )
    module.prepare_data()
    module.setup("fit")
    assert module.class_names == ["no class", "shape"]
    for sample in module.datasets["train"]:
        assert sample["image"].size == (64, 64)
        assert len(sample["labels"]) <= 1
        assert all(width > 12 for width in sample["boxes"][:, 2] - sample["boxes"][:, 0])
    again = CocoDataModule(root=tmp_path / "coco", sample=True, sample_size=8, sample_image_size=64)
    with pytest.raises(MisconfigurationException, match="holds a sample made with"):
        again.prepare_data()
