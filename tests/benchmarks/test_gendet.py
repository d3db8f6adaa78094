"""GenDet's effect and speed experiments: what they compare, that no label leaks, that their tables add up."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image


@pytest.fixture
def effects(load):
    return load("gendet")


@pytest.fixture
def options(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("train2017", "val2017"):
        for number in range(3):
            path = tmp_path / "photographs" / folder / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    return argparse.Namespace(runs=tmp_path / "runs", photographs=2, crops=3, crop=16, seeds=[0])


def test_files_say_nothing_and_photographs_do_not_mix(effects, options, tmp_path):
    found = effects.photographs(tmp_path / "photographs", 2)
    assert {split: len(files) for split, files in found.items()} == {"train": 2, "test": 2}
    assert all("train2017" in str(path) for path in found["train"])
    root = options.runs / "data"
    effects.write_data(tmp_path / "photographs", root, options)
    assert len(list(root.glob("*/*/train/ai/*.png"))) == 6 * 6
    assert effects.metadata_accuracy(root) == 0.5
    for path in root.glob("*/*/*/ai/*.png"):
        with Image.open(path) as image:
            image.save(path, compress_level=9)
    assert effects.metadata_accuracy(root) > 0.9, "the check would see files of another size"


def test_the_released_encoder_becomes_timm_s(effects, tmp_path):
    network = timm.create_model(effects.MODEL)
    renamed = {f"_layer{place}": value for place, value in enumerate(network.state_dict().values())}
    torch.save(renamed, tmp_path / "released.pth")
    state = torch.load(effects.encoder_file(tmp_path / "released.pth", tmp_path), weights_only=True)
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value)


def reports(seen, *values):
    def row(value):
        return dict.fromkeys(("ap", "accuracy", "calibrated_accuracy", "discrepancy_auc"), value)

    return [
        {
            "scores": {
                name: row(1.0 if name in seen else value)
                for name in ("nearest", "tconv", "vae", "diff", "vq", "spec")
            }
        }
        for value in values
    ]


def test_tables(effects):
    found = {"GenDet": reports(["vq"], 0.7, 0.8), "linear probe": reports(["vq"], 0.9, 0.7)}
    text = effects.summary(found, ["vq"])
    assert "| GenDet | 75.0 (70.0-80.0) |" in text
    assert text.splitlines()[2].endswith("| 100.0 (100.0-100.0) |")
    assert "| linear probe | 80.0 / 80.0 |" in effects.by_generator(found, ["vq"])
    assert "vq*" in effects.by_generator(found, ["vq"]).splitlines()[0]
    lost = effects.comparison(found, ["vq"]).splitlines()[1]
    assert lost.startswith("- to linear probe: nearest (-5.0)")
    assert "vq" not in lost


def test_every_variant_can_be_made(effects, tmp_path):
    state = timm.create_model(effects.MODEL).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    for make, epochs in effects.variants(tmp_path / "weights.pt").values():
        module = make()
        if hasattr(module, "stages"):
            assert module.stages.total == epochs
    assert torch.equal(module.network.conv_stem.weight, state["conv_stem.weight"])


def test_the_speed_benchmark_times_both_ways(monkeypatch, tmp_path, capsys, load):
    speed = load("speed_gendet")
    line = "speed.py --model test_resnet --image-size 32 --images 40 --batch-size 4 --repeats 1"
    monkeypatch.setattr("sys.argv", [*line.split(), "--json", str(tmp_path / "speed.json")])
    monkeypatch.setattr(speed, "peak_megabytes", lambda *_: 1.0)
    assert speed.main() == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["ratio"] > 0
    assert set(found["cpu_seconds"]) == {"filling", "cached", "uncached"}
    assert "a recipe has 50" in capsys.readouterr().out
