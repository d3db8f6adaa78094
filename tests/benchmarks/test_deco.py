"""The experiments on DECO: their recipes build what they say, and their tables add up."""

import argparse
import json

import pytest
import torch
from PIL import Image

from lightning_modules.deco import Deco, DecoPlus, deploy


@pytest.fixture
def effects(load):
    return load("deco")


@pytest.fixture
def speed(load):
    return load("speed_deco")


@pytest.fixture
def baseline(load):
    return load("detr_baseline")


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_both_networks_are_of_one_size(effects):
    deco, detr = (effects.built(options) for options in effects.NETWORKS.values())
    assert (type(deco).__name__, type(detr).__name__) == ("Deco", "Detr")
    assert count(detr) == pytest.approx(count(deco), rel=0.05)
    assert deco.num_queries == detr.num_queries
    assert len(deco.class_embed) == len(detr.class_embed)
    assert count(deco.backbone) == count(detr.backbone)
    assert count(deco.bbox_embed) == count(detr.bbox_embed)


def test_the_baseline_speaks_as_deco_does(baseline):
    torch.manual_seed(0)
    detr = baseline.Detr(num_classes=3, num_queries=4, hidden_dim=16, decoder_layers=2, heads=4)
    images = torch.rand(2, 3, 48, 64)
    outputs = detr.train()(images)
    assert outputs["aux_logits"].shape == (1, 2, 4, 3)
    assert outputs["aux_boxes"].shape == (1, 2, 4, 4)
    assert torch.allclose(outputs["boxes"], torch.tensor([0.5, 0.5, 0.119203, 0.119203]))
    sum(values.sum() for values in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in detr.parameters())
    evaluated = detr.eval()(images)
    assert set(evaluated) == {"logits", "boxes"}
    assert not torch.allclose(evaluated["logits"], detr(images.flip(3))["logits"]), "it must see the image"


def test_positions_tell_rows_from_columns(baseline):
    like = torch.zeros(1, 16, 4, 6)
    places = baseline.sine_position(4, 6, like).reshape(4, 6, 16)
    assert torch.equal(places[1, 0, :8], places[1, 5, :8])
    assert torch.equal(places[0, 2, 8:], places[3, 2, 8:])
    assert len({tuple(place) for place in places.flatten(0, 1).tolist()}) == 24


def test_scenes_are_of_one_category(effects, tmp_path):
    effects.draw(tmp_path / "scenes", 4)
    content = json.loads((tmp_path / "scenes" / "annotations" / "instances_train2017.json").read_text())
    assert {entry["category_id"] for entry in content["annotations"]} == {1}
    assert [entry["id"] for entry in content["categories"]] == [1]
    assert {(entry["height"], entry["width"]) for entry in content["images"]} == {(64, 64)}
    assert not any(entry["iscrowd"] for entry in content["annotations"])


def test_the_photographs_are_those_with_the_fewest_objects(effects, tmp_path):
    numbers = {1: 5, 2: 0, 3: 1, 4: 2}
    images = [{"id": key, "file_name": f"{key}.jpg"} for key in numbers]
    box = {"bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0, "category_id": 1}
    objects = [{**box, "image_id": key} for key, number in numbers.items() for _ in range(number)]
    objects = [{**entry, "id": place} for place, entry in enumerate(objects)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "all" / "annotations").mkdir(parents=True)
    (tmp_path / "all" / "train2017").mkdir()
    (tmp_path / "all" / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / "all" / "train2017" / image["file_name"])
    root = effects.photographs(tmp_path / "all", tmp_path / "few", 2)
    kept = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert [image["id"] for image in kept["images"]] == [3, 4]
    assert len(kept["annotations"]) == 3
    assert sorted(path.name for path in (root / "train2017").iterdir()) == ["3.jpg", "4.jpg"]
    assert Image.open(root / "train2017" / "3.jpg").size == (8, 8)


def test_the_table_has_a_row_for_every_form(effects):
    def reports(*values):
        return [{"metrics": {f"test/{name}": value for name in effects.METRICS}} for value in values]

    costs = {name: ["1 M", "2", "3"] for name in ("DECO", "DECO, deployed", "DETR")}
    text = effects.comparison({"DECO": reports(0.4, 0.5), "DETR": reports(0.1, 0.1)}, costs)
    assert "| DECO | 45.0 (40.0-50.0) |" in text
    assert "| DECO, deployed | as above |" in text
    assert "| DETR-0.001 | 10.0 (10.0-10.0) |" in effects.rates({"DETR-0.001": reports(0.1)})


def test_forms_are_compared_in_turn_and_agree(speed, monkeypatch):
    small = {"backbone": "small", "encoder_widths": (8, 16, 24), "encoder_depths": (1, 1, 1)}
    options = argparse.Namespace(device="cpu", threads=1, repeats=2, size=(64, 96))
    networks = {
        "deco": lambda: Deco(10, hidden_dim=24, decoder_layers=2, **small),
        "plus": lambda: DecoPlus(10, 18, num_queries=20, grid_height=4, hidden_dim=16, encoder_depth=1),
    }
    monkeypatch.setattr(speed, "NETWORKS", networks)
    with torch.inference_mode():
        for name in networks:
            found = speed.compare_forms(name, 1, options)
            assert found["difference"] < 1e-5
            assert list(found["rows"]) == ["training", "deployed"]
            assert found["rows"]["training"]["ratios"] == [1.0, 1.0]
            assert found["rows"]["deployed"]["median_seconds"] > 0
            assert len(speed.report(found).splitlines()) == 6
        monkeypatch.setattr(speed, "DetrR50", networks["deco"])
        rows = speed.compare_detr(["deco"], 1, options)["rows"]
        assert list(rows) == ["detr-r50", "deco, training", "deco, deployed"]


def test_a_wrong_folding_is_seen(speed):
    small = {"backbone": "small", "encoder_widths": (8, 16, 24), "encoder_depths": (1, 1, 1)}
    network = Deco(10, hidden_dim=24, decoder_layers=2, **small).eval()
    speed.shake(network)
    deployed = deploy(network)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert speed.difference(network, deployed, images) < 1e-5
        deployed.deco_convnet.decoder.layers[0].pwconv1_2.weight.mul_(1.1)
        assert speed.difference(network, deployed, images) > 1e-4
