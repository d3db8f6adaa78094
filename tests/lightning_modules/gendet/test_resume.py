"""Interrupted at any step, resumed, and the same end; two processes, and the same end."""

from pathlib import Path

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).parents[3]

RECIPE = {
    "model": {
        "class_path": "GenDet",
        "init_args": {
            "encoder": {
                "class_path": "ImageEncoder",
                "init_args": {"model": "test_resnet", "source": "timm", "weights": None},
            },
            "schedule": {"teacher_epochs": 1, "rotations": 2, "classifier_epochs": 1},
            "dim": 16,
            "heads": 2,
            "teacher_lr": 1e-3,
            "student_lr": 1e-3,
            "classifier_lr": 1e-3,
            "standardize": True,
        },
    },
    "data": {
        "class_path": "FakeImagesDataModule",
        "init_args": {
            "root": "data",
            "cache": "features",
            "sample": True,
            "sample_size": 20,
            "sample_image_size": 32,
            "train_on": ["nearest", "vq"],
            "transforms": {"image_size": 32, "train_resize": 40},
            "views": 2,
            "val_fraction": 0.2,
            "batch_size": 8,
            "num_workers": 0,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 8,
        "reload_dataloaders_every_n_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "StageLogger"}],
    },
    "checkpoint": {"every_n_train_steps": 1},
}


def final(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gendet")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    call("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "whole", cwd=folder)
    return folder


def assert_equal(first, second):
    assert first["global_step"] == second["global_step"]
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    assert len(first["optimizer_states"]) == 4
    for ours, theirs in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for index, state in ours["state"].items():
            for key, value in state.items():
                assert torch.equal(value, theirs["state"][index][key]), (index, key)


def curves(checkpoint):
    return next(s["history"] for name, s in checkpoint["callbacks"].items() if name.startswith("StageLogger"))


def test_killed_in_the_middle_of_a_rotation(uninterrupted, featherlight):
    whole = final(uninterrupted / "whole")
    steps = whole["global_step"]
    arguments = [
        "fit",
        "--config",
        "recipe.yaml",
        "--trainer.default_root_dir",
        "killed",
        "--ckpt_path",
        "auto",
    ]
    probe = ["--trainer.callbacks+", "probes.SignalAt", "--trainer.callbacks.name", "SIGKILL"]
    at = steps * 6 // 10  # a fake or augmenter epoch
    featherlight(*arguments, *probe, "--trainer.callbacks.step", at, status=-9, cwd=uninterrupted)
    assert final(uninterrupted / "killed")["global_step"] == at
    featherlight(*arguments, cwd=uninterrupted)
    resumed = final(uninterrupted / "killed")
    assert_equal(whole, resumed)
    assert curves(resumed) == curves(whole)
    assert [row[1] for row in curves(whole)] == [0, 1, 2, 3, 1, 2, 3, 4]  # the last validation too


def test_two_processes_end_like_one(uninterrupted, on_two_ranks):
    on_two_ranks(
        *("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "two"),
        *("--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"),
        *("--data.init_args.batch_size", "4"),
        cwd=uninterrupted,
    )
    one, two = final(uninterrupted / "whole"), final(uninterrupted / "two")
    assert one["global_step"] == two["global_step"]
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, atol=1e-5, rtol=1e-4, msg=key)
