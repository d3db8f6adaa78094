from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from callbacks.token_reduction import EViT, TokenPruningPooling, ToMe

# renamed in jsonargparse 4.49
INSTANTIATE = "instantiate" if hasattr(ArgumentParser, "instantiate") else "instantiate_classes"
CONFIGS = Path(__file__).parents[3] / "configs" / "callbacks"


@pytest.mark.parametrize(("name", "kind"), [("ppt", TokenPruningPooling), ("tome", ToMe), ("evit", EViT)])
def test_drop_ins_are_the_published_settings(name, kind):
    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    # the command line reaches every option, those of the base class too
    options["init_args"] |= {"target": "network", "stages": ["test"]}
    callback = getattr(parser, INSTANTIATE)(parser.parse_object({"callback": options})).callback
    assert isinstance(callback, kind)
    assert callback.stages == ("test",)
    assert callback.compress_blocks == (None if name == "tome" else [3, 6, 9])
    assert callback.r == {"ppt": 50, "tome": 12, "evit": None}[name]
    assert callback.visualize == 8


@pytest.mark.parametrize("value", ["pool", ["pool", "prune", "adaptive"], "[pool, prune, adaptive]"])
def test_options_for_all_blocks_or_for_each(value):
    parser = ArgumentParser()
    parser.add_class_arguments(TokenPruningPooling, "ppt")
    arguments = [
        "--ppt.policy",
        str(value).replace("'", ""),
        "--ppt.r",
        "[10, 20, 30]",
        "--ppt.threshold",
        ".inf",
    ]
    ppt = getattr(parser, INSTANTIATE)(parser.parse_args(arguments)).ppt
    assert ppt.r == [10, 20, 30]
    assert ppt.threshold == float("inf")
    assert ppt.policy in ("pool", ["pool", "prune", "adaptive"])
