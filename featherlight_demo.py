"""`featherlight demo`: a configuration and a checkpoint as a local page."""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from featherlight_cli import make_cli
from featherlight_errors import guarded


def demo(arguments: list[str]) -> int:
    """Serve the page until Ctrl-C; errors in options and files are printed as one sentence.

    Args:
        arguments: the command line without `demo`.

    Returns:
        0, or 2 for what the user has to mend.
    """
    parser = argparse.ArgumentParser(
        "featherlight demo",
        description="A local page: open a picture, click on an object, see its mask.",
        epilog="Other options are a recipe's, such as --config FILE and --model.init_args.weights FILE.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", help="checkpoint, or `auto` for the newest of the run")
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--max_megabytes", type=float, default=20.0, help="largest file the page takes")
    parser.add_argument("--max_megapixels", type=float, default=50.0, help="largest picture the page takes")
    parser.add_argument("--debug", action="store_true", help="full tracebacks")
    options, recipe = parser.parse_known_args(arguments)
    return guarded(lambda: _serve(options, recipe), options.debug)


def _serve(options: argparse.Namespace, recipe: list[str]) -> None:
    from callbacks.deploy.demo import Demo, serve

    network, warning = loaded(options.ckpt_path, recipe)
    demo = Demo(network, warning, options.max_megabytes, options.max_megapixels)
    try:
        serve(demo, options.port)
    except KeyboardInterrupt:
        print("The page is closed.")


def loaded(ckpt_path: str | None, recipe: list[str]) -> tuple[Any, str]:
    """The segmenter of a recipe with a checkpoint's weights, and what to warn of.

    Raises:
        MisconfigurationException: the recipe is of no promptable segmenter, or the checkpoint of another one.
    """
    from callbacks.run.checkpointing import chosen_checkpoint
    from lightning_modules.base import Method
    from lightning_modules.parts.weights import load_state, read_checkpoint, state_dict_of
    from lightning_modules.tinysam.network import SAM

    if not any(argument.startswith("--config") for argument in recipe):
        raise MisconfigurationException(
            "demo: --config names no recipe, such as configs/tinysam/quickstart.yaml."
        )
    cli = make_cli(recipe, run=False, with_trainer=False)
    module = cli.model
    network = getattr(module, "network", None)
    if not isinstance(module, Method) or not isinstance(network, SAM):
        raise MisconfigurationException(
            f"demo shows promptable segmenters such as TinySAMModule, not {type(module).__name__}."
        )
    directory = Path(cli.config.trainer.default_root_dir)
    path = chosen_checkpoint("demo", ckpt_path, directory, cli.config.checkpoint.dirpath)
    warning = ""
    if path is not None:
        state = state_dict_of(read_checkpoint(path), source=path)
        load_state(network, {key.removeprefix("network."): value for key, value in state.items()}, path)
    elif module.weights_origin.startswith("random"):
        warning = (
            f"These weights are not trained ({module.weights_origin}): masks mean nothing. Start the demo "
            "with --ckpt_path, or with --model.init_args.weights."
        )
        print(f"featherlight: warning: {warning}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device).eval(), warning
