"""The `featherlight` command. This file stays light, so that `featherlight --help` answers at once."""

import os
import signal
import sys
from collections.abc import Callable

USAGE = """\
usage: featherlight {fit,validate,test,predict} --config FILE [--config FILE ...] [options]
       featherlight results RUN [RUN ...] [--all] [--format table|csv|markdown|latex]
       featherlight list [recipes|plugins|models|data]
       featherlight copy NAME [FILE]
       featherlight doctor | completion
       featherlight demo --config FILE [--ckpt_path PATH] [--port N] [--max_megabytes N]

Train, test, compress, combine and deploy efficient models from YAML.

commands:
  fit         train; writes checkpoints and logs into trainer.default_root_dir
  validate    evaluate on the validation split
  test        evaluate on the test split; ends with a table and results.json
  predict     run on new data; writes predictions that a person and a program can read
  results     one table of what `test` found in several runs, with the change against the first
  list        what comes with the product: recipes, plug-ins, methods, data sets, one line each
  copy        put a recipe or plug-in into this folder, to be changed
  doctor      versions, devices, what is missing for which extra
  completion  a script that completes names in bash
  demo        a local page to try a promptable segmenter on pictures of yours

common options:
  --config FILE|NAME                a recipe, by its file or, from any folder, its name (imagenet/resnet50);
                                    later ones override earlier ones, and options override files
  --trainer.callbacks+=FILE|NAME    plug in a teacher, a pruning schedule, a report, ... (kd, rpg_98, ema)
  --model.init_args.KEY VALUE       change an argument of the method; likewise --data.init_args.KEY
  --trainer.KEY VALUE               change an argument of the Lightning Trainer
  --ckpt_path PATH|auto|best        start from a checkpoint of this run: `auto` takes the newest that is
                                    whole, `best` the one that checkpoint.monitor chose
  --seed_everything N               the seed (default 0)
  --seeds N N N                     one run for each seed, in sub-folders seed_N
  --overwrite                       let `fit` replace the run that is in its folder
  --print_config                    show the composed configuration and exit
  --debug                           full tracebacks for errors in options, data and files

`featherlight COMMAND --help` lists every option; `--model.help CLASS`, `--data.help CLASS` those of a class.
Recipes are in configs/, the documentation in docs/.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, 1 where training diverged, or 2 for what the user has to mend: options, data,
        files, disks.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"featherlight {version('featherlight')}")
        return 0
    if arguments[0] in _LIGHT:
        try:
            return _LIGHT[arguments[0]](arguments[1:])
        except BrokenPipeError:  # `featherlight list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    if arguments[0] == "demo":
        from featherlight_demo import demo

        return demo(arguments[1:])
    if "--seeds" in arguments:
        from featherlight_sweep import sweep

        return sweep(arguments)
    # imports take a while: SLURM's request to go back into the queue waits until `Preemption` can obey it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    from featherlight_cli import run

    return run(arguments)


def _results(arguments: list[str]) -> int:
    import argparse
    from pathlib import Path

    from featherlight_recipes import refuse
    from featherlight_tables import FORMS, render

    parser = argparse.ArgumentParser(
        prog="featherlight results",
        description="One table of what `test` found in several runs: a row a run, with the change against "
        "the first in percent. Runs in folders seed_0, seed_1, ... of one folder are one row, mean and "
        "standard deviation.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--all", action="store_true", help="every number, a row each")
    parser.add_argument(
        "--format", choices=FORMS, default="table", help="what it is for (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="full tracebacks")
    options = parser.parse_args(arguments)
    try:
        print(render(options.runs, options.all, options.format), end="")
    except (OSError, ValueError) as error:
        if options.debug:
            raise
        return refuse(str(error).rstrip("."))
    return 0


def _recipes(command: str) -> Callable[[list[str]], int]:
    def run_command(arguments: list[str]) -> int:
        import featherlight_recipes

        return int(getattr(featherlight_recipes, f"{command}_command")(arguments))

    return run_command


def _completion(arguments: list[str]) -> int:
    from featherlight_recipes import COMPLETION

    print(COMPLETION, end="")
    return 0


_LIGHT = {
    "results": _results,
    "completion": _completion,
    **{command: _recipes(command) for command in ("list", "copy", "doctor")},
}


if __name__ == "__main__":
    sys.exit(main())
