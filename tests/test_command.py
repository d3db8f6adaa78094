"""The command line as a user meets it."""

import functools
import json
import re
import subprocess
import sys
import time
import types

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import featherlight as featherlight_module
import lightning_modules.classification
from featherlight_options import arranged, read_options
from lightning_modules.classification import ImageClassifier
from tests.fuzzing import fuzz

RECIPE = {
    "model": {
        "class_path": "ImageClassifier",
        "init_args": {
            "model": "test_vit",
            "num_classes": 10,
            "model_args": {"img_size": 32},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
        },
    },
    "data": {
        "class_path": "CIFAR100DataModule",
        "init_args": {
            "root": "data",
            "sample": True,
            "sample_size": 64,
            "batch_size": 16,
            "num_workers": 0,
            "transforms": {"image_size": 32, "train_crop": "pad"},
        },
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return "recipe.yaml"


def test_help_imports_nothing_heavy():
    script = (
        "import sys, featherlight; status = featherlight.main(['--help']);"
        "assert status == 0; assert not {'torch', 'lightning', 'timm'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "featherlight {fit,validate,test,predict}" in done.stdout
    assert time.perf_counter() - start < 3


def test_all_four_commands_on_one_recipe(featherlight, recipe, tmp_path):
    fitted = featherlight("fit", "--config", recipe, script=True)
    assert_quiet(fitted)
    for line in (
        "CIFAR100DataModule, train: 64 images of 10 classes in data/",
        "device:   CPU, ",
        "plug-ins: none",
    ):
        assert line in fitted.stdout + fitted.stderr
    assert re.search(
        r"\nmodel:    ImageClassifier test_vit, [\d.]+ k parameters, weights: random\n", fitted.stdout
    )
    assert re.search(r"\nepoch 1/1, step 4, done in .*, loss .*, val/loss .*, val/top1 ", fitted.stdout)
    assert fitted.stdout.splitlines()[-3:] == [
        "run:  runs/recipe (config_fit.yaml, checkpoints, logs)",
        "best: runs/recipe/checkpoints/last.ckpt, the last (checkpoint.monitor chooses none)",
        "next: featherlight test --config runs/recipe/config_fit.yaml --ckpt_path auto",
    ]
    run = tmp_path / "runs" / "recipe"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    saved = yaml.safe_load((run / "config_fit.yaml").read_text())
    assert saved["seed_everything"] == 0
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.05
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.0

    featherlight("validate", "--config", recipe, "--ckpt_path", "auto")
    assert (run / "results_validate.json").is_file()
    # the saved configuration is itself a recipe
    tested = featherlight("test", "--config", run / "config_fit.yaml", "--ckpt_path", "auto")
    assert "test/top1" in tested.stdout
    assert_quiet(tested)
    assert json.loads((run / "results.json").read_text())["weights"].startswith("checkpoint: runs/recipe/")
    predicted = featherlight(
        "predict", "--config", recipe, "--ckpt_path", "auto", "--trainer.callbacks+", "ClassificationWriter"
    )
    assert_quiet(predicted)
    assert (run / "predictions.csv").read_text().count("\n") == 1 + 16
    assert (run / "contact_sheet.png").is_file()


def assert_quiet(done):
    """No warning, no advertisement, no deprecation, nothing that is drawn over and over."""
    assert not re.search(r"(?i)warning|deprecated|Tip:|lightning/|available:|\r", done.stdout + done.stderr)
    assert not done.stderr.replace(": ", "").startswith("Seed set")


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Run the command in this process, which spares the imports; gives the status and what was printed."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        try:
            status = featherlight_module.main([str(argument) for argument in arguments])
        except SystemExit as left:
            status = left.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.mark.parametrize(
    ("command", "path"), [("validate", "auto"), ("test", "auto"), ("predict", "auto"), ("test", "last")]
)
def test_only_fit_starts_without_the_checkpoint_that_was_asked_for(
    in_process, recipe, tmp_path, command, path
):
    folder = tmp_path / "runs" / "recipe" / "checkpoints"
    folder.mkdir(parents=True)
    if path == "auto":
        (folder / "last.ckpt").write_bytes(b"not a checkpoint")
    status, printed = in_process(command, "--config", recipe, "--ckpt_path", path)
    assert status == 2
    assert f"error: {command} --ckpt_path {path}: there is no " in printed
    assert "runs/recipe/checkpoints" in printed
    assert not list((tmp_path / "runs" / "recipe").glob("results*"))


def test_random_weights_are_called_random(in_process, recipe, tmp_path):
    status, printed = in_process("test", "--config", recipe)
    assert status == 0
    assert "random weights: neither trained nor loaded" in " ".join(printed.split())
    assert json.loads((tmp_path / "runs/recipe/results.json").read_text())["weights"] == "random"
    with pytest.warns(UserWarning, match="predict: the weights are random: neither trained nor loaded"):
        in_process("predict", "--config", recipe)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.init_args.modle", "x"], "modle"),
        (["--model", "ImageClasifier"], "ImageClasifier"),
        (["--trainer.epochs", "1"], "trainer.epochs"),
        (["--model.init_args.label_smoothing", "much"], "label_smoothing"),
        (["--trainer.callbacks+", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_in_options_are_one_message(in_process, recipe, arguments, said):
    status, printed = in_process("fit", "--config", recipe, *arguments)
    assert status == 2
    assert said in printed
    assert "Traceback" not in printed


def test_a_missing_root_says_what_would_fill_it(in_process, recipe):
    arguments = ["fit", "--config", recipe, "--data.init_args.sample", "false"]
    status, printed = in_process(*arguments)
    assert status == 2
    for part in ("error:", "data/cifar-100-python", "sample: true", "download: true"):
        assert part in printed
    with pytest.raises(FileNotFoundError):
        in_process(*arguments, "--debug")


def test_class_counts_that_differ_are_both_named(in_process, recipe):
    status, printed = in_process("fit", "--config", recipe, "--model.init_args.num_classes", "7")
    assert status == 2
    assert "10 classes" in printed
    assert "num_classes is 7" in printed


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickled_checkpoint_is_refused_unrun(in_process, recipe, tmp_path):
    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "evil.ckpt")
    status, printed = in_process("test", "--config", recipe, "--ckpt_path", "evil.ckpt")
    assert status == 2
    assert "evil.ckpt' is refused: it needs pickled code" in printed
    assert "never run" not in printed
    status, printed = in_process("fit", "--config", recipe, "--model.init_args.weights", "evil.ckpt")
    assert status == 2
    assert "convert it once" in printed


def test_a_run_that_dies_of_bad_numbers_leaves_a_loadable_checkpoint(featherlight, recipe, tmp_path):
    arguments = ["fit", "--config", recipe, "--checkpoint.every_n_train_steps", "1"]
    probe = ["--trainer.callbacks+", "probes.PoisonAt", "--trainer.callbacks.batch", "2"]
    done = featherlight(*arguments, *probe, status=1)
    assert "Loss term not finite: ce = nan, at batch 2 of CIFAR100DataModule (data)" in done.stderr
    last = torch.load(tmp_path / "runs/recipe/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(
        torch.isfinite(value).all() for value in last["state_dict"].values() if value.is_floating_point()
    )


def test_a_later_config_and_the_command_line_override(in_process, recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 7}\ndata: {init_args: {batch_size: 4}}\n")
    arguments = [
        "--config",
        recipe,
        "--config",
        "more.yaml",
        "--data.init_args.batch_size",
        "2",
        "--print_config",
    ]
    status, printed = in_process("fit", *arguments)
    assert status == 0
    composed = yaml.safe_load(printed)
    assert composed["trainer"]["max_epochs"] == 7
    assert composed["data"]["init_args"]["batch_size"] == 2
    assert composed["data"]["init_args"]["sample_size"] == 64


def test_a_run_without_checkpoints(in_process, recipe, tmp_path):
    status, printed = in_process("fit", "--config", recipe, "--trainer.enable_checkpointing", "false")
    assert status == 0, printed
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "spelling", [["--conf", "FILE"], ["--con=FILE"], ["-c", "FILE"], ["-cFILE"], ["-c=FILE"]]
)
def test_options_win_over_a_file_however_its_option_is_spelt(spelling):
    given = [
        "fit",
        "--trainer.max_epochs",
        "9",
        *spelling,
        "--ckpt_path=auto",
        "--checkpoint.monitor",
        "loss",
    ]
    expected = [
        "--config",
        "FILE",
        "--trainer.max_epochs",
        "9",
        "--ckpt_path=auto",
        "--checkpoint.monitor",
        "loss",
    ]
    assert arranged(given) == ["fit", *expected]


@pytest.mark.parametrize("given", [["--config"], ["--config="], ["-c"]])
def test_a_config_without_a_file_is_said(given):
    with pytest.raises(MisconfigurationException, match=r"-c\S*: the name of a YAML file is missing"):
        arranged(["fit", *given])


def test_a_recipe_may_be_a_long_text():
    assert read_options(yaml.safe_dump(RECIPE)) == RECIPE
    assert read_options(json.dumps(RECIPE)) == RECIPE


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("trainer: {max_epochs: 1}\ndata: {}\ntrainer: {max_epochs: 2}\n", "line 3, column 1"),
        ("trainer:\n  callbacks: [a]\n  callbacks: [b]\n", "line 3, column 3"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, where):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(
        MisconfigurationException, match=f"twice.yaml', {where} is not YAML: the key .* stands twice"
    ):
        read_options(str(tmp_path / "twice.yaml"))


def test_keys_of_an_anchor_may_be_replaced(tmp_path):
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, a: 3}\n"
    assert read_options(text)["other"] == {"a": 3, "b": 2}


def test_a_wrong_option_of_an_optimiser_names_it_and_the_nearest(in_process, recipe):
    status, printed = in_process(
        "fit", "--config", recipe, "--model.init_args.optimizer.init_args.momentumm", "1"
    )
    assert status == 2
    assert "torch.optim.SGD: Option 'momentumm' is not accepted (did you mean momentum?)." in printed
    assert "Namespace" not in printed
    status, printed = in_process("fit", "--config", recipe, "--model.init_args.optimizer", "torch.optim.AdmW")
    assert status == 2
    assert "module 'torch.optim' has no attribute 'AdmW' (did you mean AdamW" in printed


def test_best_is_what_the_runs_newest_checkpoint_remembers(in_process, recipe, tmp_path):
    status, printed = in_process("test", "--config", recipe, "--ckpt_path", "best")
    assert status == 2
    assert "error: test --ckpt_path best: there is no checkpoint in 'runs/recipe/checkpoints'." in printed
    status, printed = in_process("test", "--config", recipe, "--ckpt_path", "hpc")
    assert status == 2
    assert "error: ckpt_path: " in printed

    status, printed = in_process("fit", "--config", recipe, "--checkpoint.monitor", "val/top1")
    assert status == 0
    kept = "runs/recipe/checkpoints/epoch=0-step=4.ckpt"
    assert f"\nbest: {kept}, val/top1 " in printed
    assert "next: featherlight test --config runs/recipe/config_fit.yaml --ckpt_path best\n" in printed
    for name in ("runs", "moved"):
        (tmp_path / "runs").rename(tmp_path / name)
        root = ["--trainer.default_root_dir", f"{name}/recipe"]
        assert in_process("test", "--config", recipe, *root, "--ckpt_path", "best")[0] == 0
        report = json.loads((tmp_path / name / "recipe" / "results.json").read_text())
        assert report["checkpoint"] == kept.replace("runs", name)
    status, printed = in_process("fit", "--config", recipe, "--ckpt_path", "best")
    assert status == 2
    assert "goes on from its newest checkpoint, which is `auto`" in printed


def test_a_folder_that_holds_a_run_is_refused_unless_told(in_process, recipe, tmp_path):
    fit = ["fit", "--config", recipe, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    run = tmp_path / "runs" / "recipe"
    assert in_process(*fit)[0] == 0
    (run / "logs" / "older").write_text("")
    (run / "notes.txt").write_text("mine")
    status, printed = in_process(*fit)
    assert status == 2
    assert "error: fit: 'runs/recipe' holds a run already (last.ckpt in " in printed
    assert (run / "logs" / "older").exists()

    assert in_process(*fit, "--ckpt_path", "auto")[0] == 0
    assert in_process(*fit, "--ckpt_path", "runs/recipe/checkpoints/last.ckpt")[0] == 0
    (run / "checkpoints" / "epoch=9-step=9.ckpt").write_bytes(b"of the older run")
    (run / "results.json").write_text("{}")
    status, printed = in_process(*fit, "--overwrite")
    assert status == 0, printed
    there = {
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "events" not in path.name
    }
    assert {name for name in there if "hparams" not in name} == {
        "notes.txt",
        "config_fit.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/epoch=0-step=1.ckpt",
    }


def test_a_start_that_fails_leaves_no_folder(in_process, recipe, tmp_path):
    status, printed = in_process("fit", "--config", recipe, "--checkpoint.monitor", "val/topp1")
    assert status == 2
    assert "RunCheckpoint: monitor is 'val/topp1'" in printed
    assert not (tmp_path / "runs" / "recipe").exists()


@pytest.mark.parametrize("hook", ["__init__", "setup", "losses"])
def test_a_bug_of_ours_keeps_its_traceback(in_process, recipe, monkeypatch, hook):
    intact = getattr(ImageClassifier, hook)

    @functools.wraps(intact)
    def broken(self, *arguments, **options):
        if hook == "__init__":
            intact(self, *arguments, **options)
        return self.no_such_thing

    monkeypatch.setattr(ImageClassifier, hook, ours(broken))
    with pytest.raises(Exception, match="no_such_thing"):
        in_process("fit", "--config", recipe)


def ours(function):
    """`function` as if it stood in a file of the package."""
    code = function.__code__.replace(co_filename=lightning_modules.classification.__file__)
    return functools.wraps(function)(types.FunctionType(code, globals(), None, None, function.__closure__))


def test_a_schedule_shorter_than_the_run_is_one_sentence(in_process, recipe):
    status, printed = in_process(
        *("fit", "--config", recipe, "--model.init_args.lr_interval", "step"),
        *("--model.init_args.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR"),
        *("--model.init_args.lr_scheduler.init_args.max_lr", "0.1"),
        *("--model.init_args.lr_scheduler.init_args.total_steps", "2"),
    )
    assert status == 2
    assert "error: lr_scheduler: the run is longer than its schedule" in printed


def test_an_option_wins_over_a_file_behind_it(in_process, recipe, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 7, callbacks+: [LearningRateMonitor]}\n")
    options = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "train/loss"]
    arguments = [*options, "--trainer.max_epochs=3", "--config", recipe, "--config", "more.yaml"]
    status, printed = in_process("fit", *arguments, "--print_config")
    assert status == 0
    composed = yaml.safe_load(printed)["trainer"]
    assert composed["max_epochs"] == 3
    names = [callback["class_path"].rpartition(".")[2] for callback in composed["callbacks"]]
    assert names == ["LearningRateMonitor", "EarlyStopping"]


def test_what_a_loaders_process_met_is_one_sentence(in_process, recipe, tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(2):
                (tmp_path / "images" / split / name / f"{number}.png").write_bytes(b"no picture")
    data = ["--data", "ImageFolderDataModule", "--data.init_args.root", "images"]
    arguments = ["--data.init_args.sample", "false", "--data.init_args.num_workers", "1"]
    arguments += ["--model.init_args.num_classes", "2"]
    status, printed = in_process("validate", "--config", recipe, *data, *arguments)
    assert status == 2
    assert "featherlight: error: cannot read the image images/val/cat/0.png" in printed
    assert "Traceback" not in printed


def test_a_checkpoint_that_is_none_of_this_run(in_process, recipe, tmp_path):
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "bare.ckpt")
    status, printed = in_process("test", "--config", recipe, "--ckpt_path", "bare.ckpt")
    assert status == 2
    assert "model.init_args.weights" in printed


WORDS = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ["null", "[", "{a: 1}", "-1", "nan", "1e9"]
)
KEYS = [
    "trainer.max_epochs",
    "trainer.callbacks+",
    "model",
    "model.init_args.model",
    "data.init_args.batch_size",
]
KEYS += ["checkpoint", "data.init_args.transforms", "trainer.nothing", "seed_everything", "config"]


@fuzz(25)
@given(key=st.sampled_from(KEYS), word=WORDS, separate=st.booleans())
def test_any_option_is_taken_or_refused_in_a_sentence(tmp_path, capsys, key, word, separate):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    option = [f"--{key}", word] if separate else [f"--{key}={word}"]
    try:
        status = featherlight_module.main(
            ["fit", "--config", str(tmp_path / "recipe.yaml"), *option, "--print_config"]
        )
    except SystemExit as left:
        status = left.code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error: ")]
    assert (status, len(said)) in ((0, 0), (2, 1))
