"""LightningCLI over the three packages: the only place that sees them all."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    LearningRateMonitor,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

import callbacks as _callbacks  # noqa: F401  (its classes get their short names by being imported)
import datamodules as _datamodules  # noqa: F401
import lightning_modules as _lightning_modules  # noqa: F401
from callbacks.run.checkpointing import (
    AtomicCheckpointIO,
    RunCheckpoint,
    check_free,
    chosen_checkpoint,
    saved_option,
)
from callbacks.run.curves import LearningRates, LogInterval
from callbacks.run.directory import replaced_atomically, run_directory
from callbacks.run.lock import RunLock
from callbacks.run.log_lines import EpochLines, LogLines
from callbacks.run.monitors import MonitorCheck
from callbacks.run.preemption import Preemption
from callbacks.run.quiet import quiet
from callbacks.run.results import Results
from callbacks.run.resuming import ExactResume
from callbacks.run.summary import RunSummary
from callbacks.writers.base import PredictionWriter
from datamodules.reading import DataError
from featherlight_errors import USER_ERRORS, guarded, sentence_of
from featherlight_options import OptionParser, arranged, check_files, check_sections, place_loggers, recipe_of
from featherlight_recipes import configs
from lightning_modules.parts.contracts import HasNumClasses, optional

__all__ = ["USER_ERRORS", "FeatherlightCLI", "make_cli", "run"]

SHARDED = ("fsdp", "deepspeed", "model_parallel")


class SaveRunConfig(SaveConfigCallback):
    """Writes the composed configuration and the seed as `config_<command>.yaml` into the run's directory."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on rank 0 at the start of a run."""
        path = run_directory(trainer) / f"config_{TrainerFn(stage).value}.yaml"
        with replaced_atomically(path) as unfinished:
            self.parser.save(self.config, str(unfinished), skip_none=False, overwrite=True, multifile=False)


class FeatherlightCLI(LightningCLI):
    """The four commands, with a run directory, safe checkpoints and `--ckpt_path auto`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has; each can be configured under its key."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_argument(
            "--overwrite", action="store_true", help="Let `fit` replace the run that is in its folder."
        )
        parser.add_argument(
            "--debug", action="store_true", help="Full tracebacks for errors in options and data."
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # checkpoints hold plain tensors and are only ever read as such; our own table replaces Lightning's
        parser.set_defaults({"weights_only": True})
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # writers stream them; nobody reads a list
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse with the user's options behind all files, whatever the order they were given in."""
        if not isinstance(args, (list, type(None))):  # a dictionary, from Python
            super().parse_arguments(parser, args)
            return
        arguments = arranged(sys.argv[1:] if args is None else args)
        check_files(arguments)
        self.config = parser.parse_args(arguments)

    def _parse_ckpt_path(self) -> None:
        """The configuration decides: a checkpoint brings weights and progress, not options."""

    def before_instantiate_classes(self) -> None:
        """Settle the run's directory, and find the checkpoint that `auto` means."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        check_sections(config)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(self._default_directory(config))
        subfolder = os.environ.get("FEATHERLIGHT_RUN_SUBFOLDER")  # a launcher's, for each task of a job array
        if subfolder:
            config.trainer.default_root_dir = os.path.join(config.trainer.default_root_dir, subfolder)
            if config.checkpoint.dirpath is not None:
                config.checkpoint.dirpath = os.path.join(config.checkpoint.dirpath, subfolder)
        place_loggers(config.trainer)
        if self.subcommand:
            directory, folder = Path(config.trainer.default_root_dir), config.checkpoint.dirpath
            config.ckpt_path = chosen_checkpoint(self.subcommand, config.ckpt_path, directory, folder)
            if self.subcommand == "fit" and not config.overwrite and not config.trainer.fast_dev_run:
                check_free(directory, folder, config.ckpt_path)

        if "data" in config and "num_classes" in (config.model.get("init_args") or {}):
            self._fill_in_classes(config)

    def _fill_in_classes(self, config: Any) -> None:
        """Ask the checkpoint, else the data, how many classes there are, where the recipe leaves it open."""
        options = config.model.init_args
        if options.num_classes is None:
            options.num_classes = saved_option(config.get("ckpt_path"), "num_classes")
        if options.num_classes is None and config.data is not None:
            data = self._parser(self.subcommand).instantiate_classes(Namespace(data=config.data)).data
            named = optional(data, HasNumClasses)
            try:
                options.num_classes = None if named is None else named.num_classes
            except MisconfigurationException as error:  # they cannot say before they are read
                if isinstance(error, DataError):  # or there is nothing to read
                    raise

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor objects to is reported in its own words."""
        try:
            super().instantiate_classes()
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None or isinstance(error, USER_ERRORS):
                raise
            raise MisconfigurationException(sentence) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        callbacks = [RunLock(self._get(self.config, "overwrite")), MonitorCheck(), *callbacks]
        # weight averaging copies the module as it finds it: whatever joins the module must have done so
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        config["callbacks"] = sorted(given, key=lambda callback: isinstance(callback, WeightAveraging))
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
        if not config.get("barebones"):
            chosen = config.get("enable_progress_bar") is not None
            chosen = chosen or any(isinstance(callback, ProgressBar) for callback in given)
            lines = not chosen and not sys.stdout.isatty()
            lines_given = any(isinstance(callback, LogLines) for callback in given)
            callbacks = [*callbacks, RunSummary(given)]
            callbacks += [] if any(isinstance(c, LearningRateMonitor) for c in given) else [LearningRates()]
            callbacks += [LogInterval()] if config.get("log_every_n_steps") is None else []
            callbacks += [] if lines_given else [LogLines() if lines else EpochLines()]
            if config.get("enable_model_summary") is None:
                config["enable_model_summary"] = self._get(self.config, "debug")  # ours says less
        return super()._instantiate_trainer(config, callbacks)

    @staticmethod
    def _default_directory(config: Any) -> Path:
        """`runs/deco/r50_coco` for `--config configs/deco/r50_coco.yaml`: the recipe names the run."""
        name = recipe_of(file for file in config.get("config") or [] if file is not None)
        if name is None:
            return Path("runs") / "default"
        home = configs()  # where a recipe that was named has come from, whatever folder that lies in
        inside = home is not None and Path(name).resolve().is_relative_to(home)
        recipe = Path(os.path.relpath(name, home if inside else None)).with_suffix("")
        parts = [part for part in recipe.parts if part not in ("..", "configs", os.sep)]
        return Path("runs", *parts[-2:])

    def _run_subcommand(self, subcommand: str) -> None:
        # from before data are prepared, features cached and any worker forked
        with self._get(self.config_init, "preemption").watching(self.trainer):
            super()._run_subcommand(subcommand)

    def before_predict(self) -> None:
        """Say so if nothing is going to keep the predictions."""
        if not any(isinstance(c, (PredictionWriter, BasePredictionWriter)) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "predict: no callback writes the predictions. Add one, for a classifier "
                "--trainer.callbacks+=configs/callbacks/predictions.yaml"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with our logger and checkpoint writer unless the user chose others."""
        config = self._get(self.config_init, "trainer")
        if config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(config.default_root_dir, name="", version="logs")
        if not _is_sharded(config.strategy):
            plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins]
            plugins = [plugin for plugin in plugins if plugin is not None]
            if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)


def _is_sharded(strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    return any(kind in name.lower().replace("modelparallel", "model_parallel") for kind in SHARDED)


def make_cli(arguments: list[str] | None, run: bool = True, with_trainer: bool = True) -> FeatherlightCLI:
    """Parse the command line, build what it names and, if wanted, run it.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
        run: expect a command first, and run it. Otherwise only parse and build.
        with_trainer: False leaves the Trainer unbuilt (it refuses devices that the machine does not have).
    """
    kind = FeatherlightCLI if with_trainer else _WithoutTrainer
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={"callbacks": [ExactResume(), Results()]},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=arguments,
        run=run,
        parser_class=OptionParser,
    )


class _WithoutTrainer(FeatherlightCLI):
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def run(arguments: list[str]) -> int:
    """Parse, instantiate and run; errors in options, data, files and disks are printed as one sentence.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0, 1 where training diverged, or 2 for what the user has to mend.
    """
    logging.getLogger("timm").setLevel(logging.WARNING)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a recipe may name classes of a module in the working directory
    given = None if arguments == sys.argv[1:] else arguments
    debug = "--debug" in arguments
    with contextlib.nullcontext() if debug else quiet():
        return guarded(lambda: make_cli(given), debug, training="fit" in arguments)
