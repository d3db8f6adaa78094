"""Search of quantization steps: candidates together, losers left out early, against one pass a candidate.

    python benchmarks/speed.py ptq [--images 8] [--repeats 3]

All layers and products of a small ViT, with the same captured inputs and gradients and the same 100
candidates and three rounds; in turns, one thread, time of the process. The steps that come out are compared.
"""

import argparse
import copy
import sys
from functools import partial
from typing import Any
from unittest import mock

import timm
import torch
from common import clock, interleaved, markdown, ratios

from callbacks.quantization.scheme import VisionScheme
from callbacks.quantization.vision import PTQSettings, layers, search
from callbacks.quantization.vision.calibration import Calibration
from callbacks.quantization.vision.layers import SearchOptions
from callbacks.quantization.vision.observe import observe
from callbacks.quantization.vision.structure import Form, Structure, unit_of


def prepared(size: int, images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Units of a network by name, at min-max, and what they saw."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=4,
        embed_dim=size,
        depth=2,
        num_heads=2,
    ).eval()
    batch = (torch.randn(images, 3, 32, 32),)
    structure = Structure.of(observe(network, lambda: network(*batch)))
    structure.apply(network)
    names = structure.order
    calibration = Calibration(
        network, lambda x: {"logits": network(*x)}, [batch], {"logits": "classes"}, PTQSettings()
    )
    calls = calibration._captured(names)
    units = {name: unit_of(network, name, VisionScheme(), structure, Form()) for name in names}
    for name, unit in units.items():
        unit.set_minmax(calls[name])
    return units, calls


def find(units: dict[str, Any], calls: dict[str, Any], options: SearchOptions) -> dict[str, Any]:
    """The chosen candidates of every unit; the units keep their min-max steps."""
    chosen = {}
    for name, unit in units.items():
        minmax = {key: operand.step for key, operand in unit.operands().items()}
        unit.search(calls[name], options)
        chosen[name] = copy.copy(unit.indices)
        for key, operand in unit.operands().items():
            operand.step = minmax[key]
    return chosen


def one_by_one(units: dict[str, Any], calls: dict[str, Any]) -> dict[str, Any]:
    """A pass of all images for each candidate of each round."""
    whole = partial(layers._chunked, most=1)
    with mock.patch.object(search, "BATCH_ELEMENTS", 1), mock.patch.object(layers, "_chunked", whole):
        return find(units, calls, SearchOptions(every=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    units, calls = prepared(arguments.width, arguments.images)
    ways = {
        "a pass for each candidate": partial(one_by_one, units, calls),
        "together": partial(find, units, calls, SearchOptions()),
    }
    results = {name: way() for name, way in ways.items()}
    slow, fast = results.values()
    numbers = [(slow[n][key], fast[n][key]) for n in slow for key in slow[n]]
    same = sum(int((a == b).sum()) for a, b in numbers)
    what, now = clock("cpu", 1)
    times = interleaved(ways, arguments.repeats, now)
    found = sorted(ratios(*times.values()))
    rows = [[name, f"{min(seconds):.2f} s"] for name, seconds in times.items()]
    rows.append(
        ["ratio, median (range)", f"{found[len(found) // 2]:.2f} ({found[0]:.2f} to {found[-1]:.2f})"]
    )
    print(markdown([f"{len(units)} layers and products, {arguments.images} images", what], rows))
    print(f"\nthe same candidate in {same} of {sum(a.numel() for a, _ in numbers)} choices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
