"""What there is to name on a command line: recipes, plug-ins, methods, data sets; from whatever folder.

It imports nothing heavy, so that `featherlight list`, `copy` and `doctor` answer at once.
"""

import ast
import difflib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PLUGINS = "callbacks"
KINDS = ("recipes", "plugins", "models", "data")
SUFFIXES = (".yaml", ".yml")

_HERE = Path(__file__).resolve().parent
_EXPORTS = {"models": "lightning_modules", "data": "datamodules"}
_EXTRAS = {
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "llm": ("compressed-tensors", "gguf", "accelerate", "lm-eval"),
}
_LIBRARIES = ("torch", "torchvision", "lightning", "timm", "transformers", "open_clip_torch", "jsonargparse")


# Files


def configs() -> Path | None:
    """The folder of recipes: of the clone, else of the installed wheel; None where there is none."""
    if (_HERE / "configs").is_dir():
        return _HERE / "configs"
    try:
        files = metadata.files("featherlight") or []
    except metadata.PackageNotFoundError:
        return None
    parents = (Path(str(file.locate())) for file in files if file.name == "quickstart.yaml")
    return next((file.resolve().parent for file in parents if file.parent.name == "configs"), None)


def resolved(value: str, plugin: bool = False) -> str:
    """The file that a word of the command line means.

    A file that is there is itself. Otherwise `imagenet/resnet50`, `configs/imagenet/resnet50.yaml` and, for a
    plug-in, `kd` are looked for among the recipes that came with the product.

    Args:
        value: what was given to `--config` or `--trainer.callbacks+`.
        plugin: look among the plug-ins.

    Returns:
        A path that exists, or `value` unchanged.
    """
    folder = configs()
    if folder is None or not re.fullmatch(r"[\w./+-]+", value) or ".." in value or Path(value).is_file():
        return value
    name = value.removeprefix("./").removeprefix("configs/")
    if value == name and value.endswith(SUFFIXES):
        return value  # a file of one's own, which is not there
    for place in (folder / PLUGINS, folder) if plugin else (folder,):
        for suffix in ("", *SUFFIXES):
            file = place / f"{name}{suffix}"
            if file.is_file() and file.resolve().is_relative_to(folder) and file.resolve().name == file.name:
                return str(file)  # the last: on some systems RTN.yaml, after the class, is rtn.yaml
    return value


def near_misses(value: str, plugin: bool = False) -> list[str]:
    """Names of recipes or plug-ins that look like a word that means none."""
    names = [name for name, _ in entries("plugins" if plugin else "recipes")]
    name = re.sub(r"\.ya?ml$", "", value.removeprefix("./").removeprefix("configs/"))
    name = name.removeprefix(f"{PLUGINS}/") if plugin else name
    for cutoff in (0.9, 0.6):
        if found := difflib.get_close_matches(name, names, n=3, cutoff=cutoff):
            return found
    short = {known.rpartition("/")[2]: known for known in names}
    return [short[near] for near in difflib.get_close_matches(name.rpartition("/")[2], short, n=3)]


# Lists


def entries(kind: str) -> Iterator[tuple[str, str]]:
    """Name and one line of each recipe, plug-in, method or data module.

    Args:
        kind: one of `KINDS`.
    """
    if kind in _EXPORTS:
        yield from _classes(_HERE / _EXPORTS[kind])
        return
    folder = configs()
    if folder is None:
        return
    root = folder / PLUGINS if kind == "plugins" else folder
    for file in sorted(root.rglob("*.yaml")):
        if kind == "recipes" and file.is_relative_to(folder / PLUGINS):
            continue
        yield file.relative_to(root).with_suffix("").as_posix(), _first_comment(file)


def _first_comment(file: Path) -> str:
    """The comment that a recipe begins with, its first sentence; behind it what it goes on top of."""
    lines: list[str] = []
    base = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if below := re.fullmatch(r"on top of: configs/(.+)\.yaml", text):
            base = f" (on top of {below[1]})"
        else:
            lines.append(text)
    return _first_sentence(" ".join(lines)) + base


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[\w)`'])[.;](?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


def _classes(package: Path) -> Iterator[tuple[str, str]]:
    """The Lightning classes that a package exports, with the first line of their docstrings; nothing is
    imported.
    """
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        for alias in node.names:
            found = _definition(package.parent, str(node.module), alias.name)
            if found is not None and _is_lightning(package.parent, *found) and alias.name not in _BASES:
                yield alias.asname or alias.name, _first_sentence(ast.get_docstring(found[0]) or "")


_BASES = ("Method", "DataModule", "VisionDataModule")
"""What users build their own on, and cannot name in a recipe."""


def _definition(root: Path, module: str, name: str, depth: int = 4) -> tuple[ast.ClassDef, str] | None:
    """The class statement of `from module import name`, through packages that hand it on, and its module."""
    path = root / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if depth == 0 or not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(root, node.module, alias.name, depth - 1)
    return None


def _is_lightning(root: Path, definition: ast.ClassDef, module: str) -> bool:
    """Whether a class comes from LightningModule or LightningDataModule, and is no part of one."""
    for base in (ast.unparse(base).rpartition(".")[2] for base in definition.bases):
        if base in ("LightningModule", "LightningDataModule"):
            return True
        found = _definition(root, module, base)
        if found is not None and _is_lightning(root, *found):
            return True
    return False


# Commands


def list_command(arguments: list[str]) -> int:
    """`featherlight list [recipes|plugins|models|data] [--names]`: one line each."""
    plain = "--names" in arguments
    kinds = [word for word in arguments if word != "--names"]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        return refuse(f"list: there is no '{unknown[0]}'; expected {', '.join(KINDS)}")
    for kind in kinds or KINDS:
        rows = list(entries(kind))
        if plain:
            print("\n".join(name for name, _ in rows))
            continue
        print(f"{kind}{_HOW[kind]}")
        _print_rows(rows)
    return 0


_HOW = {
    "recipes": ", for --config NAME",
    "plugins": ", for --trainer.callbacks+=NAME",
    "models": ", for --model NAME",
    "data": ", for --data NAME",
}


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    room = max(shutil.get_terminal_size((100, 24)).columns - width - 5, 20)
    for name, line in rows:
        short = line if len(line) <= room else f"{line[: room - 1].rstrip()}…"
        print(f"  {name:<{width}}  {short}".rstrip())


def copy_command(arguments: list[str]) -> int:
    """`featherlight copy NAME [FILE]`: a recipe or plug-in of the product, put here to be changed."""
    if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
        return refuse("copy: expected the NAME of a recipe or plug-in, and maybe a FILE for it")
    name = arguments[0]
    source = next((Path(found) for found in (resolved(name), resolved(name, True)) if found != name), None)
    if source is None:
        near = near_misses(name) or near_misses(name, plugin=True)
        hint = (
            f" (did you mean {' or '.join(near)}?)" if near else "; `featherlight list` shows what there is"
        )
        return refuse(f"copy: there is no recipe or plug-in '{name}'{hint}")
    target = Path(arguments[1] if len(arguments) == 2 else source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        return refuse(f"copy: '{target}' is there already; give another FILE")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        return refuse(f"copy: '{target}' cannot be written: {error.strerror}")
    print(f"{target}: change it, then use it as --config {target}" if _is_recipe(source) else f"{target}")
    return 0


def _is_recipe(file: Path) -> bool:
    return file.parent.name != PLUGINS


def doctor_command(arguments: list[str]) -> int:
    """`featherlight doctor`: versions, devices, and what is missing for which extra."""
    if arguments:
        return refuse(f"doctor: takes no '{arguments[0]}'")
    rows = [("python", f"{platform.python_version()} ({sys.executable})"), ("system", platform.platform())]
    rows += [(name, _version(name) or "missing") for name in ("featherlight", *_LIBRARIES)]
    rows += [("recipes", str(configs() or "missing: install the wheel, or work in a clone"))]
    rows += [("devices", device) for device in _devices()]
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        if missing:
            said = f"missing {', '.join(missing)}: pip install 'featherlight[{extra}]'"
        else:
            said = "complete: " + ", ".join(f"{package} {_version(package)}" for package in packages)
        rows.append((f"extra {extra}", said))
    width = max(len(name) for name, _ in rows)
    for name, said in rows:
        print(f"{name:<{width}}  {said}")
    absent = [name for name in _LIBRARIES if _version(name) is None]
    return 2 if absent else 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    """What a run could be on, without the seconds that importing torch takes."""
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which("nvidia-smi"):
        try:
            found = subprocess.run(
                ["nvidia-smi", *query], capture_output=True, text=True, timeout=10, check=True
            )
            yield from found.stdout.strip().splitlines()
        except (OSError, subprocess.SubprocessError):
            yield "nvidia-smi is there and does not answer"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        yield "Apple silicon (mps)"
    yield f"CPU, {_cores()} cores"


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


COMPLETION = """\
# bash: eval "$(featherlight completion)"; zsh: autoload -U bashcompinit && bashcompinit first
_featherlight() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} plugin="--trainer.callbacks+" words
  if [ "$COMP_CWORD" = 1 ]; then
    words="fit validate test predict results demo list copy doctor completion"
  elif [ "$before" = --config ]; then
    words="$(featherlight list recipes --names)"
  elif [[ "$before" = "$plugin" || "${COMP_WORDS[COMP_CWORD-2]}$before" = "$plugin=" ]]; then
    words="$(featherlight list plugins --names)"
  elif [ "$before" = --model ]; then
    words="$(featherlight list models --names)"
  elif [ "$before" = --data ]; then
    words="$(featherlight list data --names)"
  elif [ "${COMP_WORDS[1]}" = list ]; then
    words="recipes plugins models data"
  elif [ "${COMP_WORDS[1]}" = copy ]; then
    words="$(featherlight list recipes plugins --names)"
  else
    words="--config --model --data --trainer.callbacks+ --ckpt_path --seed_everything"
    words="$words --seeds --overwrite --print_config --debug"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _featherlight featherlight
"""


def refuse(sentence: str) -> int:
    """Print what is wrong; gives the exit status."""
    print(f"featherlight: error: {sentence}.", file=sys.stderr)
    return 2
