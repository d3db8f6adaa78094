"""The two "write your own" pages, followed to the letter: write the files they show, type the commands they
give.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(page, folder, featherlight):
    for language, name, text in BLOCK.findall((DOCS / page).read_text()):
        if name:
            (folder / name).write_text(text)
        elif language == "bash":
            for line in text.strip().replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program == "featherlight"
                featherlight(*arguments)


def test_write_your_own_method(featherlight, tmp_path):
    follow("write_your_own_method.md", tmp_path, featherlight)
    metrics = json.loads((tmp_path / "runs/my_method/results_validate.json").read_text())["metrics"]
    assert metrics["val/top1"] > 0.15, "better than chance after four epochs"


def test_write_your_own_callback(featherlight, tmp_path):
    follow("write_your_own_callback.md", tmp_path, featherlight)
    results = json.loads((tmp_path / "runs/recipe/results.json").read_text())
    assert results["weight_clipping"]["largest_weight"] == pytest.approx(0.2, abs=1e-6)
    saved = torch.load(tmp_path / "runs/recipe/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert saved["objectives.unit.target"] != 1, "the objective's target was trained"
