"""Interrupted at a step and resumed to the same end; two processes that share cache and rounds."""

from pathlib import Path

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).parents[3]


def network(dim):
    sizes = {"dims": [dim, dim, 2 * dim, 2 * dim], "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2]}
    encoder = {"class_path": "lightning_modules.tinysam.TinyViT", "init_args": {**sizes, "width": 32}}
    encoder["init_args"]["windows"] = [7, 7, 4, 3]
    sam = {"image_size": 64, "encoder": encoder, "width": 32, "hidden": 32}
    return {"class_path": "lightning_modules.tinysam.SAM", "init_args": sam}


RECIPE = {
    "model": {
        "class_path": "TinySAMModule",
        "init_args": {
            "network": network(8),
            "prompts": {"rounds": 2},
            "protocol": {"clicks": 1},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {
        "class_path": "SA1BDataModule",
        "init_args": {
            "root": "data",
            "sample": True,
            "sample_size": 12,
            "sample_image_size": 48,
            "image_size": 64,
            "masks_per_image": 2,
            "val_fraction": 0.2,
            "cache": "embeddings",
            "cache_images": 6,
            "cache_shard_bytes": 2048,
            "batch_size": 2,
            "num_workers": 0,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "SAMTeacher", "init_args": {"teacher": network(12)}}],
    },
    "checkpoint": {"every_n_train_steps": 1},
}


def final(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinysam")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    call("fit", "--config", "recipe.yaml", "--trainer.default_root_dir", "whole", cwd=folder)
    return folder


def test_killed_and_resumed(whole, featherlight):
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
    featherlight(*arguments, *probe, "--trainer.callbacks.step", 4, status=-9, cwd=whole)
    assert final(whole / "killed")["global_step"] == 4
    featherlight(*arguments, cwd=whole)
    ours, theirs = final(whole / "killed"), final(whole / "whole")
    assert ours["global_step"] == theirs["global_step"] == 6
    assert not [key for key in theirs["state_dict"] if "teacher" in key]
    for key, value in theirs["state_dict"].items():
        assert torch.equal(value, ours["state_dict"][key]), key


def test_two_processes(whole, on_two_ranks):
    """They write a cache together, the same as that of one; no parameter is left without a gradient."""
    on_two_ranks(
        *("fit", "--config", "recipe.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--data.init_args.batch_size", "1", "--trainer.default_root_dir", "two"),
        *("--data.init_args.cache", "shared", "--trainer.max_steps", "3"),
        cwd=whole,
    )
    assert final(whole / "two")["global_step"] == 3
    one, two = (
        {p.name: p for p in (whole / name).glob("*/*/*/shard_*.npy")} for name in ("embeddings", "shared")
    )
    assert len(one) == 3
    assert one.keys() == two.keys()
    for name, path in one.items():
        assert path.read_bytes() == two[name].read_bytes()
