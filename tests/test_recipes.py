"""Recipes by name from anywhere, and the commands that show what there is."""

import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pytest
import yaml
from lightning.pytorch import LightningDataModule

import callbacks
import datamodules
import featherlight
import lightning_modules
from featherlight_options import arranged, check_files
from featherlight_recipes import configs, entries, near_misses, resolved

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "plugin", "file"),
    [
        ("imagenet/resnet50", False, "imagenet/resnet50.yaml"),
        ("configs/imagenet/resnet50.yaml", False, "imagenet/resnet50.yaml"),
        ("trainer/ddp", False, "trainer/ddp.yaml"),
        ("kd", True, "callbacks/kd.yaml"),
        ("configs/callbacks/kd.yaml", True, "callbacks/kd.yaml"),
    ],
)
def test_a_name_is_a_recipe_from_any_folder(elsewhere, word, plugin, file):
    assert resolved(word, plugin) == str(REPOSITORY / "configs" / file)


@pytest.mark.parametrize(
    "word", ["KD", "EarlyStopping", "kdd", "../configs/quickstart", "kd.yaml", "{a: 1}", "null", ""]
)
def test_other_words_stay_what_they_are(elsewhere, word):
    assert resolved(word, plugin=True) == word


def test_a_file_of_ones_own_comes_first(elsewhere):
    (elsewhere / "kd").write_text("class_path: KD\n")
    assert resolved("kd", plugin=True) == "kd"


def test_names_on_the_command_line(elsewhere):
    folder = REPOSITORY / "configs"
    words = arranged(
        ["fit", "--trainer.callbacks+=kd", "--trainer.callbacks+", "ema", "--config", "quickstart"]
    )
    assert words == [
        "fit",
        *("--config", str(folder / "quickstart.yaml")),
        f"--trainer.callbacks+={folder / 'callbacks' / 'kd.yaml'}",
        *("--trainer.callbacks+", str(folder / "callbacks" / "ema.yaml")),
    ]


def test_a_near_miss_is_named(elsewhere):
    with pytest.raises(
        FileNotFoundError, match=r"there is no file 'imagenet/resnet5' \(did you mean imagenet/res"
    ):
        check_files(arranged(["fit", "--config", "imagenet/resnet5"]))
    assert near_misses("magnitud_pruning", plugin=True) == ["magnitude_pruning"]
    assert "ofakd/cifar100/vit_small__resnet18" in near_misses("vit_small_resnet18")


def test_every_recipe_plugin_method_and_data_module_is_listed_with_a_line():
    for kind in ("recipes", "plugins", "models", "data"):
        listed = dict(entries(kind))
        assert listed, kind
        assert [name for name, line in listed.items() if len(line) < 8] == []
    models, data = dict(entries("models")), dict(entries("data"))
    exported = {
        name
        for name in lightning_modules.__all__
        if name != "Method" and issubclass(getattr(lightning_modules, name), lightning_modules.Method)
    }
    assert exported <= set(models)
    assert set(models) <= set(lightning_modules.__all__)
    kinds = [getattr(datamodules, name, None) for name in datamodules.__all__]
    exported = {
        kind.__name__ for kind in kinds if isinstance(kind, type) and issubclass(kind, LightningDataModule)
    }
    assert set(data) == exported - {"DataModule", "VisionDataModule"}
    assert set(yaml.safe_load((configs() / "callbacks" / "kd.yaml").read_text())) <= {
        "class_path",
        "init_args",
    }
    assert callbacks.__doc__


def test_list_prints_names_for_completion(capsys):
    assert featherlight.main(["list", "plugins", "--names"]) == 0
    assert capsys.readouterr().out.split() == sorted(
        file.stem for file in (REPOSITORY / "configs" / "callbacks").glob("*.yaml")
    )
    assert featherlight.main(["list", "plugin"]) == 2
    assert "there is no 'plugin'; expected recipes, plugins" in capsys.readouterr().err


def test_copy_puts_a_recipe_here_and_overwrites_nothing(elsewhere, capsys):
    assert featherlight.main(["copy", "imagenet/resnet50"]) == 0
    original = REPOSITORY / "configs" / "imagenet" / "resnet50.yaml"
    assert (elsewhere / "resnet50.yaml").read_text() == original.read_text()
    assert featherlight.main(["copy", "imagenet/resnet50"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert featherlight.main(["copy", "kd", "mine.yaml"]) == 0
    assert (elsewhere / "mine.yaml").is_file()
    assert featherlight.main(["copy", "imagenet/resnet5"]) == 2
    assert "did you mean imagenet/resnet50?" in capsys.readouterr().err


def test_doctor_names_versions_devices_and_extras(capsys):
    assert featherlight.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch ", "lightning ", "CPU, ", "extra export", str(REPOSITORY / "configs")):
        assert word in text


def test_light_commands_import_nothing_heavy():
    program = (
        "import sys, featherlight\n"
        "for words in (['--help'], ['doctor'], ['list'], ['completion']):\n"
        "    assert featherlight.main(words) == 0\n"
        "assert featherlight.main(['results', 'nowhere']) == 2\n"
        "assert not {'torch', 'lightning', 'numpy', 'timm'} & set(sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert time.monotonic() - start < 20  # under a second each, on a machine that does nothing else


def test_the_wheel_brings_every_recipe():
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        packed = tomllib.load(file)["tool"]["setuptools"]["data-files"]
    files = {file for globs in packed.values() for pattern in globs for file in REPOSITORY.glob(pattern)}
    assert files == set((REPOSITORY / "configs").rglob("*.yaml"))
    for target, (pattern,) in packed.items():
        assert f"{target.removeprefix('share/featherlight/')}/*.yaml" == pattern


def test_recipes_of_an_installed_wheel(monkeypatch, tmp_path):
    (tmp_path / "share/configs").mkdir(parents=True)
    (tmp_path / "share/configs/quickstart.yaml").write_text("model: {}\n")
    monkeypatch.setattr("featherlight_recipes._HERE", tmp_path)

    class Packed(PurePosixPath):
        def locate(self):
            return tmp_path / self

    monkeypatch.setattr(
        "featherlight_recipes.metadata.files", lambda name: [Packed("share/configs/quickstart.yaml")]
    )
    assert configs() == tmp_path / "share" / "configs"
    assert resolved("quickstart") == str(tmp_path / "share" / "configs" / "quickstart.yaml")


def test_completion_is_bash():
    assert featherlight.main(["completion"]) == 0
    subprocess.run(["bash", "-n"], input=featherlight_completion(), text=True, check=True)


def featherlight_completion() -> str:
    from featherlight_recipes import COMPLETION

    return COMPLETION
