"""The `featherlight` command. This file stays light, so that `featherlight --help` answers at once."""

import signal
import sys

USAGE = """\
usage: featherlight {fit,validate,test,predict} --config FILE [--config FILE ...] [options]
       featherlight results RUN [RUN ...]
       featherlight demo --config FILE [--ckpt_path PATH] [--port N] [--max_megabytes N]

Train, test, compress, combine and deploy efficient models from YAML.

commands:
  fit         train; writes checkpoints and logs into trainer.default_root_dir
  validate    evaluate on the validation split
  test        evaluate on the test split; ends with a table and results.json
  predict     run on new data; writes predictions that a person and a program can read
  results     one table of what `test` found in several runs
  demo        a local page to try a promptable segmenter on pictures of yours

common options:
  --config FILE                     a recipe; later files override earlier ones, and options override files
  --trainer.callbacks+=FILE         plug in a teacher, a pruning schedule, a report, ...
  (configs/callbacks/*.yaml)
  --model.init_args.KEY VALUE       change an argument of the method; likewise --data.init_args.KEY
  --trainer.KEY VALUE               change an argument of the Lightning Trainer
  --ckpt_path PATH|auto             start from a checkpoint; `auto` takes the newest loadable one of this
  run, or none
  --seed_everything N               the seed (default 0)
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
    if arguments[0] == "results":
        return _results(arguments[1:])
    if arguments[0] == "demo":
        from featherlight_demo import demo

        return demo(arguments[1:])
    # imports take a while: SLURM's request to go back into the queue waits until `Preemption` can obey it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    from featherlight_cli import run

    return run(arguments)


def _results(runs: list[str]) -> int:
    from pathlib import Path

    if not runs or runs[0] in ("-h", "--help"):
        print("usage: featherlight results RUN [RUN ...]")
        return 0 if runs else 2
    from callbacks.run.results import compare
    from featherlight_errors import guarded

    return guarded(lambda: compare([Path(run) for run in runs if run != "--debug"]), "--debug" in runs)


if __name__ == "__main__":
    sys.exit(main())
