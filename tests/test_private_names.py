"""The private names of other libraries that our code touches: all are listed, and all are still there."""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.test_dependencies import REPOSITORY, our_files, requirements


@dataclass(frozen=True)
class Private:
    """A name that a library may rename in any release.

    Attributes:
        owner: module or class that has it, importable.
        name: the attribute, or a key of its state.
        files: of ours that touch it.
        purpose: what breaks without it.
    """

    owner: str
    name: str
    files: tuple[str, ...]
    purpose: str

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0]


_FIT_LOOP = "lightning.pytorch.loops.fit_loop._FitLoop"
_EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
_CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
_CLI = "lightning.pytorch.cli.LightningCLI"
_DDP = "torch.nn.parallel.DistributedDataParallel"
_CHECKPOINTING, _RESUMING = ("callbacks/run/checkpointing.py",), ("callbacks/run/resuming.py",)
_ENCODER = ("lightning_modules/parts/encoder.py",)
_GEOMETRY, _AVERAGING = "callbacks/run/geometry.py", "lightning_modules/parts/averaging.py"
_EXPERTS = ("callbacks/quantization/experts.py",)
_COMMAND = ("featherlight_cli.py",)

PRIVATE = (
    Private(_CHECKPOINT, "_every_n_train_steps", _CHECKPOINTING, "last.ckpt of every epoch"),
    Private(_CHECKPOINT, "_train_time_interval", _CHECKPOINTING, "last.ckpt of every epoch"),
    Private(_CHECKPOINT, "_every_n_epochs", _CHECKPOINTING, "last.ckpt of every epoch"),
    Private(_CHECKPOINT, "_last_global_step_saved", _CHECKPOINTING, "last.ckpt as new as the run's end"),
    Private(_CHECKPOINT, "_monitor_candidates", _CHECKPOINTING, "writing last.ckpt"),
    Private(_CHECKPOINT, "_save_last_checkpoint", _CHECKPOINTING, "writing last.ckpt"),
    Private(_FIT_LOOP, "_data_fetcher", (*_RESUMING, _GEOMETRY), "resuming in the middle of an epoch"),
    Private(_FIT_LOOP, "_combined_loader", (*_RESUMING, _GEOMETRY), "resuming the loaders inside an epoch"),
    Private(_FIT_LOOP, "_load_combined_loader_states", _RESUMING, "resuming the loaders"),
    Private(
        _EPOCH_LOOP,
        "_should_check_val_fx",
        (*_RESUMING, _GEOMETRY),
        "resuming between a step and its validation",
    ),
    Private(_EPOCH_LOOP, "_batches_that_stepped", _RESUMING, "the step that the loggers count on resume"),
    Private(
        "lightning.pytorch.callbacks.Callback",
        "_generate_state_key",
        ("callbacks/pruning/base.py", "callbacks/token_reduction/base.py"),
        "two callbacks of one class in a checkpoint",
    ),
    Private(
        "lightning.pytorch.Trainer",
        "_signal_connector",
        ("callbacks/run/preemption.py",),
        "signals that Lightning would obey in the middle of a step",
    ),
    *(
        Private("lightning.pytorch.callbacks.WeightAveraging", name, (_AVERAGING,), "counters and thresholds")
        for name in ("_average_model", "_copy_average_to_current", "_swap_models")
    ),
    Private(
        "torch.nn.modules.batchnorm",
        "_NormBase",
        (_AVERAGING, "lightning_modules/parts/modes.py", "lightning_modules/tinysam/training.py"),
        "telling the statistics of norms from other buffers",
    ),
    Private(
        "jsonargparse.ArgumentParser", "_actions", ("featherlight_options.py",), "near misses of options"
    ),
    *(
        Private(
            "torch.optim.lr_scheduler.SequentialLR",
            name,
            ("lightning_modules/parts/schedules.py",),
            "the length of a schedule",
        )
        for name in ("_milestones", "_schedulers")
    ),
    Private(
        "lightning.pytorch.LightningModule",
        "_trainer",
        (
            "lightning_modules/base.py",
            "lightning_modules/deco/module.py",
            "lightning_modules/dfkd_t3/module.py",
            "lightning_modules/gendet/module.py",
            "lightning_modules/cfam/module.py",
            "lightning_modules/lightclip/module.py",
            "lightning_modules/tinysam/module.py",
        ),
        "scoring and loading without a Trainer",
    ),
    Private(
        "lightning.pytorch.trainer.connectors.logger_connector.result",
        "_ResultMetric",
        ("lightning_modules/parts/logging.py",),
        "logging a step's losses in place",
    ),
    Private(_CLI, "_get", _COMMAND, "the options of the Trainer"),
    Private(_CLI, "_parser", _COMMAND, "asking the data for the number of classes"),
    Private(_CLI, "_instantiate_trainer", _COMMAND, "the order of callbacks"),
    Private(_CLI, "_parse_ckpt_path", _COMMAND, "options from the recipe instead of from the checkpoint"),
    Private(_CLI, "_prepare_subcommand_parser", _COMMAND, "the defaults of each subcommand"),
    Private(_CLI, "_run_subcommand", _COMMAND, "signals before the run begins"),
    Private(
        "timm.models.vision_transformer.VisionTransformer",
        "_pos_embed",
        ("callbacks/token_reduction/network.py",),
        "the forward pass of a ViT with token reduction",
    ),
    Private(
        "torch.nn.Module",
        "_apply",
        _ENCODER,
        "moving the frozen encoder, which is no part of the module tree",
    ),
    Private(
        "torch.nn.Module",
        "_modules",
        (
            "lightning_modules/dfkd_t3/networks.py",
            "lightning_modules/dfkd_t3/texts.py",
            "lightning_modules/language_model.py",
            "lightning_modules/text_classifier.py",
        ),
        "loading a network late",
    ),
    Private(
        "torch.nn.Module",
        "_load_from_state_dict",
        ("lightning_modules/gendet/baselines.py", "callbacks/quantization/vision/operands.py"),
        "banks and steps of the checkpoint's size",
    ),
    Private("torch.nn.Module", "_apply", _EXPERTS, "experts that are views and stay with their owner"),
    Private("torch.nn.Module", "_forward_hooks", _EXPERTS, "experts that are watched"),
    Private("torch.nn.Module", "_forward_pre_hooks", _EXPERTS, "experts that are watched"),
    Private(
        _DDP,
        "_set_params_and_buffers_to_ignore_for_model",
        ("callbacks/distillation/teacher.py",),
        "banks that DDP does not broadcast",
    ),
    Private(
        _DDP,
        "_ddp_params_and_buffers_to_ignore",
        ("callbacks/distillation/teacher.py",),
        "banks that DDP does not broadcast",
    ),
    Private(
        "torch.optim.lr_scheduler.LRScheduler",
        "_last_lr",
        ("lightning_modules/parts/schedules.py",),
        "the learning rate that loggers show",
    ),
    Private("torch.utils", "_python_dispatch", ("callbacks/measure/macs.py",), "counting MACs"),
    Private("torch.ops.aten.mm.default", "_schema", ("callbacks/measure/macs.py",), "counting MACs"),
    Private("torch.UntypedStorage", "_cdata", ("callbacks/measure/macs.py",), "MACs of sparse weights"),
)


@pytest.mark.parametrize("private", PRIVATE, ids=lambda p: f"{p.owner.rpartition('.')[2]}.{p.name}")
def test_a_private_name_is_still_there(private):
    assert _has(_resolve(private.owner), private.name), (
        f"{private.library} {importlib.metadata.version(private.library)} has no "
        f"`{private.owner}.{private.name}`, which {' and '.join(private.files)} needs for {private.purpose}: "
        "look in its source for what took the name's place and use that, or lower the upper bound of "
        f"{private.library} in pyproject.toml to the last release that has it."
    )


def test_libraries_with_private_names_have_an_upper_bound():
    bounds = {requirement.name: str(requirement.specifier) for requirement in requirements()}
    assert {private.library for private in PRIVATE} <= set(bounds)
    for library in {private.library for private in PRIVATE}:
        assert "<" in bounds[library].replace("!=", ""), (
            f"pyproject.toml allows any {library}, whose private names are used: cap it behind the newest "
            "release that `make test-newest` passed with."
        )


def test_every_private_name_that_is_used_is_listed():
    listed = {(file, private.name) for private in PRIVATE for file in private.files}
    used = set(_outside_of_classes()) | set(_of_base_classes())
    assert sorted(used - listed) == [], (
        "these private names of other libraries are not listed: use public ones, or add them to PRIVATE with "
        "what they are for, and cap their library in pyproject.toml"
    )
    assert sorted(listed - used) == [], "nobody uses these any more: take them out of PRIVATE"


def test_the_scan_finds_all_kinds_of_use():
    source = (
        "import torch._inductor.config\nfrom lightning.pytorch.loops.utilities import _reset\n"
        "trainer.fit_loop._epoch = 1\ngetattr(model, '_hooks', ())\nstate['_steps'] += 1\n"
        "class Own:\n    def _mine(self): return self._of_a_base\n"
        "def f(own, pair): return own._mine(), pair._replace(a=1), __name__, [_ for _ in ()]\n"
    )
    assert set(_names(ast.parse(source), {"_mine"})) == {"_inductor", "_reset", "_epoch", "_hooks", "_steps"}
    assert _has(_resolve(_CLI), "_parse_ckpt_path")
    assert not _has(_resolve(_CLI), "_parse_ckpt_path_of_2031")
    assert _has(_resolve(_CHECKPOINT), "_last_global_step_saved")  # set in __init__ only
    assert not _has(_resolve(_CHECKPOINT), "_last_global_step")


# Finding what is used


def _is_private(name: str) -> bool:
    named_tuple = name in ("_asdict", "_replace", "_fields", "_make")  # public there
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name)) and not name.endswith("__") and not named_tuple


def _outside_of_classes() -> Iterator[tuple[str, str]]:
    """Files of ours and private names that they import, or ask of an object, and that we define nowhere."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in our_files()}
    ours = {"_exit"} | {name for tree in trees.values() for name in _defined(tree)}  # os._exit is no secret
    for file, tree in trees.items():
        for name in _names(tree, ours):
            yield file.relative_to(REPOSITORY).as_posix(), name


def _defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, arguments, and whatever is assigned to a name or to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _on_self(node):
            yield node.attr


def _names(tree: ast.AST, ours: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and not _is_ours(node.module):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and not _on_self(node) and node.attr not in ours:
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = _constants(node.args[1:2], ours)
        elif isinstance(node, ast.Subscript):
            names = _constants([node.slice], ours)
        yield from filter(_is_private, names)


def _constants(nodes: list[ast.expr], ours: set[str]) -> list[str]:
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return [value for value in values if isinstance(value, str) and value not in ours]


def _on_self(node: ast.Attribute) -> bool:
    """Then `_of_base_classes` knows whose it is."""
    on_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
    return on_super or getattr(node.value, "id", "") in ("self", "cls")


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"callbacks", "lightning_modules", "datamodules", "featherlight_cli"}


def _of_base_classes() -> Iterator[tuple[str, str]]:
    """Files and private names of classes of ours that a base class of another library has, too.

    Whether they are meant to be the base's or collide with it by chance: a listed one is meant.
    """
    for module in _our_modules():
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                file = Path(inspect.getfile(module)).relative_to(REPOSITORY).as_posix()
                mine = _defined_in(kind) | _on_instances(kind)
                foreign = [base for base in kind.__mro__ if not _is_ours(base.__module__)]
                for name in mine:
                    if not name.startswith("_abc_") and any(_has_itself(base, name) for base in foreign):
                        yield file, name


def _defined_in(kind: type) -> set[str]:
    """Without what a metaclass adds."""
    written = set(re.findall(r"\w+", inspect.getsource(kind)))
    return {name for name in vars(kind) if _is_private(name)} & written


def _our_modules() -> Iterator[Any]:
    for package in ("callbacks", "lightning_modules", "datamodules"):
        path = importlib.import_module(package).__path__
        for found in pkgutil.walk_packages(path, f"{package}."):
            yield importlib.import_module(found.name)
    yield importlib.import_module("featherlight_cli")


# Asking what a library has


def _resolve(owner: str) -> Any:
    parts = owner.split(".")
    value = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:index]))
        value = getattr(value, part)
    return value


def _has(owner: Any, name: str) -> bool:
    bases = owner.__mro__ if isinstance(owner, type) else ()
    return hasattr(owner, name) or any(_has_itself(base, name) for base in bases)


def _has_itself(kind: type, name: str) -> bool:
    return name in vars(kind) or name in _on_instances(kind)


_SEEN: dict[type, set[str]] = {}


def _on_instances(kind: type) -> set[str]:
    """Private names that the source of a class uses of `self`, `super()`, or by a string."""
    if kind not in _SEEN:
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # written in C, or made by a function
            source = ""
        names = re.findall(r"(?:\bself|\bcls|super\(\))\.(_\w+)|[\"'](_\w+)[\"']", source)
        _SEEN[kind] = {name for pair in names for name in pair if _is_private(name)}
    return _SEEN[kind]
