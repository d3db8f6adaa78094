"""What wins over what on the command line, and what is said of mistakes in it."""

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import featherlight as featherlight_module
from featherlight_options import arranged, check_files, read_options, recipe_of, shortened

CALLBACKS = ["--trainer.callbacks+=kd.yaml", "--trainer.callbacks.teacher", "null"]


def test_files_come_first_and_everything_else_keeps_its_order():
    given = ["fit", *CALLBACKS, "--config", "a.yaml", "--x=1", "-c", "b.yaml", "--config=c.yaml", "--y"]
    files = ["--config", "a.yaml", "--config", "b.yaml", "--config", "c.yaml"]
    assert arranged(given) == ["fit", *files, *CALLBACKS, "--x=1", "--y"]
    assert arranged(["--config", "all.yaml", "fit", "--a", "--config", "b.yaml"]) == [
        *("--config", "all.yaml", "fit", "--config", "b.yaml", "--a")
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**contents):
        for name, content in contents.items():
            (tmp_path / f"{name}.yaml").write_text(content)

    return write


LIST = "trainer: {callbacks: [{class_path: %s}]}"


def test_callbacks_that_a_later_file_takes_away_are_named(files, recwarn):
    files(
        a=LIST % "x.Teacher",
        b=LIST % "Pruning",
        c="trainer: {callbacks+: [Timer]}",
        d="trainer: {max_epochs: 1}",
    )
    check_files(["fit", "--config", "a.yaml", "--config", "c.yaml", "--config=d.yaml"])
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"b\.yaml replaces .*: Teacher of --config a\.yaml, Timer of --config c"
    ):
        check_files(["fit", "--config", "a.yaml", "--config", "c.yaml", "--config=b.yaml"])
    with pytest.warns(UserWarning, match=r"--trainer.callbacks \[\] replaces .*Teacher"):
        check_files(["fit", "--config", "a.yaml", "--trainer.callbacks=[]"])


def test_a_list_that_keeps_them_says_nothing(files, recwarn):
    files(a=LIST % "Teacher", b="trainer: {callbacks: [{class_path: Teacher}, {class_path: Timer}]}")
    check_files(["fit", "--config", "a.yaml", "--config", "b.yaml", "--trainer.callbacks+", "More"])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model:\n  a: [x\n b: 1\n", r"line 3, column 3 is not YAML"),
        (b"- 1\n", "a list"),
        (b"", "nothing"),
        (b"# caf\xe9\n", "UTF-8"),
        (b"a: 2024-99-99\n", "not YAML"),
    ],
)
def test_files_that_are_no_recipes_are_named(tmp_path, content, said):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(MisconfigurationException, match=rf"a\.yaml'.*{said}"):
        read_options(str(tmp_path / "a.yaml"))


def test_other_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file 'gone\.yaml'"):
        read_options("gone.yaml")
    with pytest.raises(MisconfigurationException, match="is a folder"):
        read_options(str(tmp_path))
    assert read_options("{trainer: {max_epochs: 3}}") == {"trainer": {"max_epochs": 3}}


def test_the_recipe_and_not_where_it_runs_names_the_run(files):
    files(slurm="trainer: {devices: 1}", deco="model: {class_path: A}")
    assert recipe_of(["slurm.yaml", "deco.yaml"]) == "deco.yaml"
    assert recipe_of(["slurm.yaml"]) == "slurm.yaml"
    assert recipe_of([]) is None


def test_a_long_complaint_becomes_a_sentence_with_the_nearest_word():
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes: [a, b]\n'
        "  Errors:\n"
        "    - Problem with given class_path 'lightning_modules.ImageClassifier':\n"
        "        Option 'modle' is not accepted\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: NestedArg(key='modle', val='x')"
    )
    assert shortened(message) == (
        "option 'model': lightning_modules.ImageClassifier: Option 'modle' is not accepted "
        "(did you mean model?)."
    )
    assert "--trainer.max_epochs" in shortened(
        "unrecognized arguments: --trainer.max_epoch 1", ["--trainer.max_epochs", "--data"]
    )


def said(capsys, *arguments):
    status = featherlight_module.main(["fit", *arguments])
    printed = capsys.readouterr().err
    assert printed.count("featherlight: error:") == 1
    assert "usage" not in printed
    return status, printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config", "{trainr: {max_epochs: 1}}"], "trainr.max_epochs"),
        (["--trainer.epochs", "1"], "did you mean --trainer.min_epochs or --trainer.max_epochs"),
        (
            ["--model", "ImageClasifier"],
            "there is neither a class nor a file 'ImageClasifier' (did you mean ImageClassifier?).",
        ),
        (["--trainer.max_epochs", "many"], "option 'trainer.max_epochs': Expected a int; got many"),
        (["--config", "{checkpoint: null, model: ImageClassifier}"], ""),
    ],
)
def test_the_command_says_one_sentence(capsys, arguments, part):
    status, printed = said(capsys, *arguments)
    assert status == 2
    assert part in printed
