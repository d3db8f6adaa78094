"""Every file under configs/ must compose and come to life.

A file whose model has a class is a recipe and stands alone; one with a class at the top is a drop-in; any
other is put on top of the recipe that its first line names (`# on top of: configs/...yaml`), or else of the
quick start.
"""

import contextlib
import io
import re
from pathlib import Path

import open_clip
import pytest
import timm
import yaml

import lightning_modules.parts.weights
from featherlight_cli import make_cli

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
CONTENTS = {path: yaml.safe_load(path.read_text()) for path in FILES}
DROP_INS = [path for path in FILES if "class_path" in CONTENTS[path]]
RECIPES = [path for path in FILES if "class_path" in (CONTENTS[path].get("model") or {})]
OVERLAYS = [path for path in FILES if path not in DROP_INS and path not in RECIPES]


def name(path):
    return str(path.relative_to(CONFIGS))


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch):
    """Networks without the weights that only the hub has."""
    create = timm.create_model
    monkeypatch.setattr(
        lightning_modules.parts.weights.timm,
        "create_model",
        lambda *a, pretrained=False, **k: create(*a, **k),
    )
    clip = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *a, pretrained=None, **k: clip(*a, **k))


def instantiate(*arguments, trainer=True):
    with contextlib.redirect_stdout(io.StringIO()):
        return make_cli(list(arguments), run=False, with_trainer=trainer)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    if path.name == "images.yaml":  # which counts the folders of data that are not here
        options += ["--model.init_args.num_classes", "3"]
    cli = instantiate("--config", str(path), *options)
    assert cli.model is not None
    assert cli.datamodule is not None
    assert cli.trainer.max_epochs or cli.trainer.max_steps


@pytest.mark.parametrize("path", DROP_INS, ids=name)
def test_drop_ins(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(CONFIGS / "quickstart.yaml")
    cli = instantiate("--config", recipe, f"--trainer.callbacks+={path}")
    wanted = CONTENTS[path]["class_path"].rpartition(".")[2]
    assert wanted in {type(callback).__name__ for callback in cli.trainer.callbacks}


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_overlays_keep_to_known_options(path, tmp_path, monkeypatch):
    recipe = base_of(path)
    if path.stem in ("wandb", "mlflow"):
        pytest.importorskip(path.stem)
    monkeypatch.chdir(tmp_path)
    cli = instantiate("--config", str(recipe), "--config", str(path), trainer=False)
    added = [entry["class_path"] for entry in (CONTENTS[path].get("trainer") or {}).get("callbacks+", [])]
    assert {type(callback).__name__ for callback in cli.config_init.trainer.callbacks or []} >= set(added)
    for section, options in CONTENTS[path].items():
        assert_holds(cli.config[section], options, cli.config.trainer.default_root_dir)


def base_of(path):
    """The recipe that an overlay belongs on."""
    named = re.match(r"# on top of: configs/(\S+)\n", path.read_text())
    return CONFIGS / (named[1] if named else "quickstart.yaml")


def assert_holds(config, options, root):
    """Every plain value of `options` is found where it belongs in the composed configuration."""
    config = config._asdict() if hasattr(config, "_asdict") else config  # named tuples are built already
    for key, value in options.items():
        if isinstance(value, dict):
            assert_holds(config[key], value, root)
        elif not isinstance(value, list):
            found = config[key]
            if "{run}" in str(value):
                value = value.replace("{run}", str(root))
            assert found == value or str(value) in (getattr(found, "name", None), str(found))  # enums, paths
