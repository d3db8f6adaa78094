import argparse
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import data, integers, sampled_from
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file

from lightning_modules.parts.weights import build_network, load_weights, state_dict_of
from tests.fuzzing import fuzz, outcome


@pytest.fixture
def network():
    return build_network("test_resnet", num_classes=4)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_an_unknown_model_lists_near_misses():
    with pytest.raises(ValueError, match=r"no model 'resnet81'.*resnet18"):
        build_network("resnet81")


def test_pretrained_weights_that_cannot_be_fetched_are_a_sentence_with_model_and_option(monkeypatch):
    def offline(*_, **__):
        raise FileNotFoundError("Name or service not known")

    monkeypatch.setattr("timm.create_model", offline)
    said = r"weights: pretrained: timm's weights of 'test_resnet' .* \(Name or service not known\)"
    with pytest.raises(MisconfigurationException, match=said):
        build_network("test_resnet", "pretrained")


@pytest.mark.parametrize("wrap", ["bare", "timm", "ddp", "ema_only_ignored", "ours"])
def test_checkpoints_of_every_origin_load(tmp_path, network, wrap):
    state = network.state_dict()
    checkpoint = {
        "bare": state,
        "timm": {"state_dict": state, "arch": "test_resnet", "args": argparse.Namespace(lr=0.1)},
        "ddp": {"model": {f"module.{key}": value for key, value in state.items()}},
        "ema_only_ignored": {"state_dict": state, "state_dict_ema": {}},
        "ours": {
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {f"network.{k}": v for k, v in state.items()} | {"objectives.kd.w": torch.ones(1)},
        },
    }[wrap]
    torch.save(checkpoint, tmp_path / "weights.pth")
    assert same(build_network("test_resnet", tmp_path / "weights.pth", 4), network)


def test_safetensors(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    assert same(build_network("test_resnet", tmp_path / "weights.safetensors", 4), network)


def test_the_averaged_weights_on_request():
    checkpoint = {"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"w": torch.ones(1)}}
    assert state_dict_of(checkpoint, prefer_ema=True)["w"] == 1
    assert state_dict_of(checkpoint)["w"] == 0


def test_a_missing_file_is_named(network):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_weights(network, "nowhere.pth")


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickled_checkpoint_is_refused_unrun(tmp_path, network, capsys):
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"state_dict": Payload()}, file)
    torch.save({"model": Payload()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(
            MisconfigurationException, match=rf"{name}' is refused: it needs pickled code.*convert"
        ):
            load_weights(network, tmp_path / name)
    assert "never run" not in capsys.readouterr().out


def test_a_truncated_file_is_reported(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(MisconfigurationException, match=r"half.pth"):
        load_weights(network, tmp_path / "half.pth")


def test_keys_that_do_not_fit_are_listed(tmp_path, network):
    state = network.state_dict()
    state["extra"] = torch.ones(1)
    del state["fc.bias"]
    state["fc.weight"] = torch.ones(7, 7)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(MisconfigurationException) as error:
        load_weights(network, tmp_path / "other.pth")
    message = str(error.value)
    assert "1 missing: fc.bias" in message
    assert "1 unexpected: extra" in message
    assert "fc.weight: (7, 7) in the file, (4, 96) in the network" in message


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict_ema", "backbone"])
def test_weights_under_other_names_are_found(tmp_path, network, key):
    torch.save({"epoch": 3, key: network.state_dict(), "args": {"lr": 1}}, tmp_path / "weights.pth")
    assert same(build_network("test_resnet", tmp_path / "weights.pth", 4), network)


def test_the_keys_of_a_file_without_known_weights_are_named(tmp_path, network):
    state = network.state_dict()
    torch.save({"epoch": 3, "teacher": state, "student": state}, tmp_path / "two.pth")
    with pytest.raises(
        MisconfigurationException, match=r"two.pth' holds no weights.*epoch, teacher, student"
    ):
        load_weights(network, tmp_path / "two.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"some garbage", "damaged"),
        (b"\x80\x04K", "damaged|refused"),
    ],
)
def test_what_is_no_file_of_weights_is_told(tmp_path, network, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MisconfigurationException, match=rf"{name}'.*({said})") as raised:
        load_weights(network, tmp_path / name)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


@fuzz(60)
@given(data())
def test_a_damaged_file_is_read_or_refused_in_a_sentence(tmp_path, network, draw):
    kind = draw.draw(sampled_from(["pth", "legacy", "safetensors"]))
    path = tmp_path / f"fuzzed.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file({"w": torch.ones(3)}, path)
    else:
        torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=kind == "pth")
    content = bytearray(path.read_bytes())
    for _ in range(draw.draw(integers(1, 4))):
        content[draw.draw(integers(0, len(content) - 1))] = draw.draw(integers(0, 255))
    path.write_bytes(content[: draw.draw(integers(1, len(content)))])
    outcome(lambda: load_weights(network, path), path)
