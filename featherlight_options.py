"""The command line before anything is built: what wins over what, and mistakes in one sentence each."""

import difflib
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from featherlight_recipes import entries, near_misses, resolved

CONFIG = "--config"
COMMANDS = ("fit", "validate", "test", "predict")
LONGEST = 160  # characters of a value or a list that a sentence repeats

_CONFIG = re.compile(r"(--co(?:n(?:f(?:ig?)?)?)?|-c)(?:=(.*))?|-c([^=].*)", re.DOTALL)
"""Every spelling that argparse takes: `--config FILE`, `--config=FILE`, `--conf FILE`, `-c FILE`, ..."""
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value type: .*"
    r"|Expected a <class 'NoneType'>\.?|Not a valid subclass of .*|Subclass types expect one of:"
    r"|a class path \(str\)|a dict with(out)? .*"
)
_OF_A_CALLABLE = re.compile(
    r"Type \S+Callable\[.*?\] expects a function or a callable class: (Option '\w+' is not accepted)\. "
    r"Got value: Namespace\(class_path='([\w.]+)'.*"
)

_NO_CLASS = re.compile(
    r"Expected a path but (\S+) either not accessible or invalid; "
    r"Expected a dot import path string: \S+; got \1"
)
_NO_ATTRIBUTE = re.compile(
    r"(?:Expected a path but .*?; )?Type \S+Callable\[.*?\] expects a function or a callable class: "
    r"(module '([\w.]+)' has no attribute '(\w+)').*"
)


class OptionParser(LightningArgumentParser):
    """Reports a mistake in one sentence, without the list of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the command line.

        Raises:
            MisconfigurationException: always, unless jsonargparse itself is trying something out.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parsers: list[Any] = [self]
        for action in self._actions:
            choices = action.choices if isinstance(action.choices, dict) else {}
            parsers += [parser for parser in choices.values() if isinstance(parser, LightningArgumentParser)]
        options = [
            option for parser in parsers for action in parser._actions for option in action.option_strings
        ]
        raise MisconfigurationException(shortened(message, options)) from ex


# The order


def arranged(arguments: Sequence[str]) -> list[str]:
    """The command's arguments with its `--config FILE` in front, so that options win wherever they stand.

    Files keep their order among each other, and so do all other arguments: an option may refer to the one
    before it (`--trainer.callbacks+=FILE --trainer.callbacks.teacher null`).

    Raises:
        MisconfigurationException: a `--config` without a file.
    """
    start = next((place for place, word in enumerate(arguments, start=1) if word in COMMANDS), 0)
    files: list[str] = []
    others: list[str] = []
    words = iter(arguments[start:])
    for word in words:
        if (found := _CONFIG.fullmatch(word)) is None:
            others += _with_file(word, words)
            continue
        value = found[2] if found[2] is not None else found[3]
        value = next(words, None) if value is None else value
        if not value:
            raise MisconfigurationException(f"{word}: the name of a YAML file is missing.")
        files += [CONFIG, resolved(value)]
    return [*arguments[:start], *files, *others]


def _with_file(word: str, words: Iterator[str]) -> list[str]:
    """An option as it was given; the name of a plug-in (`--trainer.callbacks+=kd`) becomes its file."""
    option, equals, value = word.partition("=")
    if option not in ("--trainer.callbacks", "--trainer.callbacks+"):
        return [word]
    if equals:
        return [f"{option}={resolved(value, plugin=True)}"]
    return [word, *(resolved(value, plugin=True) for value in itertools.islice(words, 1))]


def check_files(arguments: Sequence[str]) -> None:
    """Look at the files of an arranged command line before they are merged.

    Says so where one of them, or an option, takes callbacks away that an earlier one has named.

    Raises:
        FileNotFoundError: a file is not there.
        MisconfigurationException: one cannot be read, or is no YAML, or holds no options; names it.
    """
    present: dict[str, str] = {}  # callback: who named it
    for source, key, value in _sections(arguments):
        names = _names(value)
        lost = [name for name in present if name not in names]
        if key == "callbacks" and lost:
            owners = ", ".join(f"{name} of {present[name]}" for name in lost)
            rank_zero_warn(
                f"{source} replaces the list of callbacks: {owners} will not run. To keep them, write "
                "`callbacks+:` in a file, or `--trainer.callbacks+` on the command line."
            )
        if key == "callbacks":
            present = {}
        present |= dict.fromkeys(names, source)


def _sections(arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Everything that sets callbacks: (where it stands, `callbacks` or `callbacks+`, what is set)."""
    words = iter(arguments)
    command = ""
    for word in words:
        command = command or (word if word in COMMANDS else "")
        option, equals, value = word.partition("=")
        if option not in (CONFIG, "--trainer", "--trainer.callbacks", "--trainer.callbacks+"):
            continue
        value = value if equals else next(words, "")
        if option.startswith("--trainer.callbacks"):
            yield f"{option} {value}", option.removeprefix("--trainer."), value
            continue
        content: Any = read_options(value, option)
        if option == CONFIG:
            content = content.get(command, content) if not command or command in content else content
            content = content.get("trainer") if isinstance(content, dict) else None
        for key in ("callbacks", "callbacks+"):
            if isinstance(content, dict) and key in content:
                yield f"{option} {value}", key, content[key]


def read_options(file: str, option: str = "--config") -> dict[str, Any]:
    """The options that a YAML file holds, or a text in YAML, as jsonargparse takes both.

    Raises:
        FileNotFoundError: there is no such file.
        MisconfigurationException: it cannot be read, is no YAML, holds no options or has a key twice; names
            file and line.
    """
    path = Path(file).expanduser() if "\n" not in file else None  # a text may be too long for a name
    is_file = path is not None and os.path.isfile(path)
    if path is not None and os.path.isdir(path):
        raise MisconfigurationException(f"{option}: '{file}' is a folder, not a YAML file.")
    try:
        text = path.read_text(encoding="utf-8") if path is not None and is_file else file
        content = _OnceLoader(text).get_single_data()
    except UnicodeDecodeError as error:
        raise MisconfigurationException(
            f"{option}: '{file}' is not a text in UTF-8 ({error.reason} at byte {error.start})."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or one_line(str(error))
        raise MisconfigurationException(f"{option}: '{file}'{where} is not YAML: {reason}.") from error
    except ValueError as error:  # PyYAML on a date or an integer that is none
        raise MisconfigurationException(f"{option}: '{file}' is not YAML: {error}.") from error
    if not is_file and not isinstance(content, dict):
        near = near_misses(file) if option == CONFIG else []
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise FileNotFoundError(f"{option}: there is no file '{file}'{hint}.")
    if not isinstance(content, dict):
        raise MisconfigurationException(
            f"{option}: '{file}' holds no options such as `trainer:` and `model:`, but {_kind(content)}."
        )
    return content


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the second without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Look at the keys as they are written, before `<<` brings others."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag == "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark
                )
            seen |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"


def _names(value: Any) -> list[str]:
    """Class names (or files) of a `callbacks` value, as it stands in YAML or on the command line."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = yaml.safe_load(value)
    names = []
    for entry in value if isinstance(value, list) else [value]:
        name = entry.get("class_path") if isinstance(entry, dict) else entry
        if isinstance(name, str) and name not in ("null", ""):
            names.append(name if name.endswith((".yaml", ".yml")) else name.rpartition(".")[2])
    return names


def check_sections(config: Namespace) -> None:
    """Refuse a group of options that is not one.

    Raises:
        MisconfigurationException: `trainer`, `checkpoint` or `preemption` is null or a value.
    """
    for section in ("trainer", "checkpoint", "preemption"):
        value = config.get(section)
        if not isinstance(value, Namespace):
            raise MisconfigurationException(
                f"{section} is a group of options, such as `{section}: {{...}}`, and cannot be "
                f"{'null' if value is None else repr(value)}: leave it out to have the defaults."
            )


def place_loggers(trainer: Namespace) -> None:
    """Write the run's directory where a logger's options say `{run}`; the configuration is changed.

    Args:
        trainer: its options, with `default_root_dir`.
    """
    given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in given:
        options = logger.get("init_args") if isinstance(logger, Namespace) else None
        if not isinstance(options, Namespace):
            continue
        for name, value in vars(options).items():
            if isinstance(value, (str, os.PathLike)) and "{run}" in str(value):
                options[name] = str(value).replace("{run}", str(trainer.default_root_dir))


def recipe_of(files: Iterable[Any]) -> str | None:
    """The first file that names a model, else the first: a run is called after it."""
    names = [str(file) for file in files]
    found = (name for name in names if os.path.isfile(name) and "model" in read_options(name))
    return next(found, names[0] if names else None)


# One sentence


def one_line(text: str) -> str:
    """`text` with its line breaks as spaces."""
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip()


def shortened(message: str, options: Sequence[str] = ()) -> str:
    """What jsonargparse says on many lines, as one sentence with the nearest correct word.

    Args:
        message: of the parser.
        options: of the command, for near misses.
    """
    parts: list[str] = []
    given = ""
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if text.startswith("Given value: "):
            given = given or re.sub(r"Given value: (?:NestedArg\(key='.*?', val=)?(.*?)\)?$", r"\1", text)
        elif text and text not in parts and not _NOISE.fullmatch(text):
            parts.append(re.sub(r"Problem with given class_path '([\w.]+)':", r"\1:", text))
    if not parts or parts[-1].endswith(":"):
        parts.append("this is no valid value")
    sentence = "".join(part + (" " if part.endswith(":") else "; ") for part in parts).rstrip(" ;.")
    sentence = _OF_A_CALLABLE.sub(r"\2: \1", sentence)
    sentence = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", sentence)
    sentence = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", sentence)
    sentence = re.sub(r'Parser key "([^"]*)"', r"option '\1'", sentence)
    if given and "Namespace" not in given and not re.search("Got value|not accepted", sentence):
        sentence += f"; got {given[:LONGEST]}"
    hint = _hint(sentence, options)
    sentence = _NO_CLASS.sub(r"there is neither a class nor a file '\1'", sentence)
    return _NO_ATTRIBUTE.sub(r"\1", sentence) + hint + "."


def _hint(sentence: str, options: Sequence[str]) -> str:
    """The words that come nearest to the one that a sentence complains of."""
    bare = [option.lstrip("-") for option in options]
    if found := re.search(r"([\w.]+): Option '(\w+)' is not accepted", sentence):
        return _near(found[2], _parameters(found[1]))
    if found := re.search(r"dot import path string: (\w+)", sentence):
        return _near(found[1], {*_class_names(), *(name for name, _ in entries("plugins"))})
    if found := _NO_ATTRIBUTE.search(sentence):
        return _near(found[3], vars(importlib.import_module(found[2])))
    if found := re.search(r"unrecognized arguments: (--[\w.+]+)", sentence):
        return _near(found[1].lstrip("-"), bare, "--")
    if found := re.search(r"does not accept option '([\w.]+)'", sentence):
        return _near(found[1], bare)
    if found := re.search(r"invalid choice: '(\w+)'", sentence):
        return _near(found[1], COMMANDS)
    return ""


def _near(word: str, known: Iterable[str], prefix: str = "") -> str:
    names = sorted(set(known))
    found = difflib.get_close_matches(word, names, n=3, cutoff=0.9) or difflib.get_close_matches(word, names)
    return f" (did you mean {' or '.join(f'{prefix}{name}' for name in found)}?)" if found else ""


def _parameters(class_path: str) -> set[str]:
    """What a class and its parents can be given."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name, None) if module else None
    if cls is None:  # an option's name, not a class's
        return set()
    makers = [vars(part).get("__init__", part) for part in cls.__mro__] if isinstance(cls, type) else [cls]
    names = {name for maker in makers for name in inspect.signature(maker).parameters}
    return names - {"self", "args", "kwargs"}


def _class_names() -> set[str]:
    """Short names of all that a recipe can name."""
    found: set[str] = set()
    waiting: list[type] = [Callback, LightningModule, LightningDataModule, Optimizer]
    while waiting:
        cls = waiting.pop()
        found.add(cls.__name__)
        waiting += cls.__subclasses__()
    return found
