"""The page on distillation: its commands parse and build what they say, its example of a criterion trains."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import timm

import lightning_modules.parts.weights
from callbacks.distillation import DistillationTeacher
from featherlight_cli import make_cli

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "callbacks" / "distillation" / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands():
    for language, _, text in BLOCK.findall(PAGE):
        if language == "bash":
            for line in text.strip().replace("\\\n", " ").splitlines():
                if line.startswith("featherlight "):
                    yield shlex.split(line)[1:]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's criterion, importable."""
    (text,) = [text for _, name, text in BLOCK.findall(PAGE) if name == "my_criterion.py"]
    (tmp_path / "my_criterion.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: Path(arguments[2]).stem)
def test_commands_build(arguments, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    create = timm.create_model
    monkeypatch.setattr(
        lightning_modules.parts.weights.timm,
        "create_model",
        lambda *a, pretrained=False, **k: create(*a, **k),
    )
    _, *options = arguments
    if "--ckpt_path" in options:  # an option of the command, not of what it builds
        place = options.index("--ckpt_path")
        del options[place : place + 2]
    with contextlib.redirect_stdout(io.StringIO()):
        cli = make_cli(options, run=False, with_trainer=False)
    built = [c for c in cli.config_init.trainer.callbacks or [] if isinstance(c, DistillationTeacher)]
    wanted = [option for option in options if option.endswith(".criterion")]
    if wanted:
        chosen = options[options.index(wanted[0]) + 1]
        assert [type(criterion).__name__ for criterion in built[0].criteria] == [chosen.rpartition(".")[2]]


def test_there_are_commands():
    assert {arguments[0] for arguments in commands()} == {"fit", "test", "validate"}


def test_the_example_trains(example, trainer, blob_data, tiny_student, tiny_teacher):
    from my_criterion import Cosine

    teacher = DistillationTeacher(tiny_teacher(), None, Cosine(0.5), image_size=32)
    run = trainer(callbacks=[teacher], limit_val_batches=0)
    run.fit(tiny_student(), blob_data())
    assert 0 < run.callback_metrics["train/cosine/cosine"] < 1
