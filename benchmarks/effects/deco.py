"""DECO against DETR: convolutional interaction against attention, everything else the same; three seeds.

    python benchmarks/effects/deco.py
    python benchmarks/effects/deco.py --overfit --data data/coco

Both learn drawn scenes: the same backbone, width, queries, number of decoder layers, heads, matcher, losses,
batches and steps (the DETR is ../detr_baseline.py); only the learning rate is each one's own. The table has
COCO's numbers on other scenes, and the CPU time of a forward pass, all networks in turn in one process.
`--rates` trains both with several learning rates on the first seed.

`--overfit` shows that the whole path learns on real photographs: a small DECO on the 16 images of a COCO
folder (`train2017/`, `annotations/instances_train2017.json`) that have the fewest objects, tested on them.
"""

import argparse
import json
import os
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import Results, fit_and_test, spread, sweep, table

HERE = Path(__file__).parent
SCENES, PHOTOGRAPHS = HERE / "deco_scenes.yaml", HERE / "deco_photographs.yaml"
NETWORKS: dict[str, list[str]] = {"DECO": [], "DETR": ["--config", str(HERE / "deco_detr.yaml")]}
RATES = (5e-4, 1e-3, 2e-3)
METRICS = ("AP", "AP50", "AP75", "AR100")
OVERFITTED = 16
SMOKE = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_test_batches=1"]


def draw(root: Path, size: int) -> None:
    """Scenes of one to three large shapes of six kinds, 64 x 64 pixels, a quarter as many to test on.

    All are of one category: to tell the kinds apart takes either network far longer than to find them.
    """
    from datamodules.samples.coco import SceneStyle, write_coco

    style = SceneStyle(most=3, radii=(0.14, 0.3), crowds=0.0, longest=1.0, named=False)
    write_coco(root, size, image_size=64, style=style)


def train(recipe: Path, options: Sequence[str], root: Path, seed: int, directory: Path) -> dict[str, Any]:
    """Train and test one detector."""
    arguments = ["--config", str(recipe), *options, "--data.init_args.root", str(root)]
    return fit_and_test(arguments, arguments, directory, seed)


def with_rate(value: float) -> list[str]:
    """Command-line options of a learning rate."""
    return ["--model.init_args.optimizer.init_args.lr", str(value)]


def metric(report: dict[str, Any], name: str) -> float:
    """One of COCO's numbers of a run."""
    return float(report["metrics"][f"test/{name}"])


def comparison(results: Results, costs: dict[str, list[str]]) -> str:
    """COCO's numbers in per cent, mean (smallest-largest), and what the networks cost."""
    rows = []
    for name, cells in costs.items():
        reports = results.get(name)
        numbers = ["as above"] * len(METRICS)
        if reports is not None:
            numbers = [spread([metric(one, key) for one in reports], 100, digits=1) for key in METRICS]
        rows.append([name, *numbers, *cells])
    return table(["network", *METRICS, "parameters", "ms, batch 1", "ms, batch 8"], rows)


def rates(results: Results) -> str:
    """AP in per cent of every network and learning rate."""
    rows = [
        [name, spread([metric(one, "AP") for one in reports], 100, 1)] for name, reports in results.items()
    ]
    return table(["network and rate", "AP"], rows)


def costs(recipes: dict[str, list[str]], rounds: int = 50) -> dict[str, list[str]]:
    """Parameters, and milliseconds of CPU time of a forward pass of each network, interleaved."""
    import time

    import torch
    from speed_deco import interleaved

    from lightning_modules.deco import deploy

    torch.set_num_threads(1)
    networks = {name: built(options) for name, options in recipes.items()}
    cells = {name: [f"{sum(p.numel() for p in n.parameters()) / 1e6:.2f} M"] for name, n in networks.items()}
    networks = {"DECO": networks["DECO"], "DECO, deployed": deploy(networks["DECO"]), **networks}
    cells = {"DECO": cells["DECO"], "DECO, deployed": [""], **cells}
    for batch in (1, 8):
        images = torch.rand(batch, 3, 64, 64)
        with torch.inference_mode():
            calls: dict[str, Callable[[], object]] = {n: partial(net, images) for n, net in networks.items()}
            seconds = interleaved(calls, rounds, time.process_time)
        for name, values in seconds.items():
            cells[name].append(f"{1e3 * statistics.median(values):.2f}")
    return cells


def built(options: Sequence[str]) -> Any:
    """The network of a recipe, in eval mode, with random weights."""
    from featherlight_cli import make_cli

    arguments = ["--config", str(SCENES), *options, "--data.init_args.root", "unused"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the options of this script are none of theirs
        return make_cli(arguments, run=False, with_trainer=False).model.network.eval()


def photographs(data: Path, root: Path, count: int) -> Path:
    """A COCO folder with the `count` training images of `data` that have the fewest objects; linked once."""
    if root.exists():
        return root
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    objects = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    numbers = Counter(entry["image_id"] for entry in objects)
    listed = sorted((image for image in content["images"] if numbers[image["id"]]), key=lambda i: i["id"])
    kept = sorted(listed, key=lambda image: numbers[image["id"]])[:count]
    ids = {image["id"] for image in kept}
    part = {**content, "images": kept}
    part["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    (root / "train2017").mkdir(parents=True)
    for image in kept:
        source = data / "train2017" / image["file_name"]
        (root / "train2017" / image["file_name"]).symlink_to(source.resolve())
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(part))
    return root


def overfit(data: Path, runs: Path, extra: Sequence[str], count: int = OVERFITTED) -> dict[str, Any]:
    """Learn some photographs by heart; the results of the test on them."""
    root = photographs(data, runs / "photographs", count)
    return train(PHOTOGRAPHS, extra, root, 0, runs / "overfit")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/deco"), help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--scenes", type=int, default=4000, help="to train on; a quarter as many to test on")
    parser.add_argument("--rates", action="store_true", help="learning rates instead, on the first seed")
    parser.add_argument("--overfit", action="store_true", help=f"{OVERFITTED} photographs instead")
    parser.add_argument("--data", type=Path, help="COCO folder, for --overfit")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything, in <runs>/smoke")
    chosen = parser.parse_args()
    if chosen.overfit and chosen.data is None:
        parser.error("--overfit needs --data, a COCO folder")
    return chosen


def expose_baseline() -> None:
    """Let this process and the commands that it starts import what lies beside this folder."""
    folder = str(HERE.parent)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def main() -> None:
    chosen = parsed()
    expose_baseline()
    runs = chosen.runs / "smoke" if chosen.smoke else chosen.runs
    extra = SMOKE if chosen.smoke else []
    if chosen.overfit:
        report = overfit(chosen.data, runs, extra)
        print(table(METRICS, [[f"{100 * metric(report, name):.1f}" for name in METRICS]]))
        return
    root = runs / "scenes"
    draw(root, 32 if chosen.smoke else chosen.scenes)
    tried = {name: [*options, *extra] for name, options in NETWORKS.items()}
    if chosen.rates:
        tried = {f"{n}-{rate:g}": [*o, *with_rate(rate)] for n, o in tried.items() for rate in RATES}
    variants = {name: partial(train, SCENES, options, root) for name, options in tried.items()}
    seeds = chosen.seeds[:1] if chosen.rates or chosen.smoke else chosen.seeds
    results = sweep(variants, seeds, runs, chosen.jobs)
    print(f"\nseeds {', '.join(map(str, seeds))}; mean (smallest-largest); CPU time, one thread\n")
    print(rates(results) if chosen.rates else comparison(results, costs(NETWORKS)))


if __name__ == "__main__":
    main()
