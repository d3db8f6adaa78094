"""Prompts to predict with, by picture, from a JSON file."""

import json
from pathlib import Path
from typing import Any

from datamodules.coco.values import shown
from datamodules.reading import DataError

FORMS = ({"points", "labels"}, {"box"}, {"points", "labels", "box"})


def read_prompts(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The prompts of each picture, by its name in the folder (an id such as `sa_223750` in SA-1B).

    A prompt is an object with `points` (x, y in pixels of the picture) and `labels` (1 on the object, 0
    beside it), with `box` (x1, y1, x2, y2), or with both.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is none of this kind; names picture and prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file {path}.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no object of prompts by picture.")
    for name, prompts in content.items():
        if not isinstance(prompts, list) or not prompts:
            raise DataError(f"{path}: {name} has {shown(prompts)}; a list of prompts is needed.")
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, dict) or set(prompt) not in FORMS:
                raise DataError(
                    f"{path}: {name}[{place}] is {shown(prompt)}; points and labels, a box, or all are "
                    "needed."
                )
    return content
