"""What each part of LightCLIP adds, and which reading of its matching, on drawn scenes (section 8.2).

    python benchmarks/effects/lightclip.py [--seeds 0 1 2] [--steps 300] [--variants all ...] [--runs FOLDER]

Scenes of two coloured shapes in a 3 x 3 grid, so that a cell is a patch; captions say what is there and how
it lies. Grounding: share of colour and shape words of a held-out caption whose best patch is the object's
cell. Masked words: accuracy of a colour or shape word that is replaced by the mask. Retrieval R@1 and
zero-shot top-1 are of held-out scenes and of single things. Runs that are there already are kept. Drawn
data: nothing here is about photographs.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import spread
from lightning.pytorch import seed_everything
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from datamodules.person_retrieval.captions import CaptionTokenizer
from datamodules.samples.scenes import COLOURS, GRID, SHAPES, Thing, captions_of, draw_scene, draw_things
from lightning_modules.lightclip import LightCLIP, Matching, Softening
from lightning_modules.lightclip.words import end_positions

LENGTH, SIDE = 24, 48
NETWORK = {"trunk": "test_resnet", "trunk_args": {"output_stride": 16}, "image_size": SIDE, "embed_dim": 64}
NETWORK |= {
    "width": 64,
    "heads": 4,
    "layers": 4,
    "context_length": LENGTH,
    "align_width": 64,
    "tie_head": True,
}
PLAIN = {"w_tok": 0.0, "w_mlm": 0.0, "softening": Softening(end=0.0)}
SOFT = Softening(end=0.2, unit="epoch")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain CLIP": PLAIN,
    "+ softened labels": {**PLAIN, "softening": SOFT},
    "+ token alignment": {**PLAIN, "w_tok": 1.0},
    "+ masked words": {**PLAIN, "w_mlm": 0.5},
    "all": {"softening": SOFT},
    "all, one-to-one": {"softening": SOFT, "matching": Matching(capacity=1)},
    "all, positives only": {"softening": SOFT, "matching": Matching(capacity=1, pairs="positives")},
    "all, FILIP": {"softening": SOFT, "matching": Matching("bidirectional")},
}


def scenes(count: int, seed: int) -> tuple[Tensor, list[list[Thing]], list[list[str]]]:
    """Pictures uint8 (count, 3, side, side), their things, and both captions of each."""
    rng = np.random.default_rng((seed, 7))
    things = [draw_scene(rng) for _ in range(count)]
    pictures = torch.stack([pil_to_tensor(draw_things(each, SIDE, rng)) for each in things])
    return pictures, things, [captions_of(each) for each in things]


def train(module: LightCLIP, steps: int, seed: int, size: int, batch: int = 48) -> None:
    """AdamW with one cycle; the softening rises over the run."""
    tokenize, rng = CaptionTokenizer(LENGTH), np.random.default_rng((seed, 3))
    pictures, _, captions = scenes(size, seed)
    ids = [tokenize([both[way] for both in captions])[0] for way in (0, 1)]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    end, kind = module.softening.end, module.softening
    module.train()
    for number in range(steps):
        rows = torch.from_numpy(rng.choice(size, batch, replace=False))
        way = torch.from_numpy(rng.integers(0, 2, batch)).bool()
        chosen = torch.where(way[:, None], ids[1][rows], ids[0][rows])
        module.softening = kind._replace(kind="constant", end=end * number / steps)
        given = {"image": pictures[rows].float() / 255, "input_ids": chosen}
        optimizer.zero_grad()
        torch.stack(list(module.losses(module.compute(given), given).values())).sum().backward()
        optimizer.step()
        schedule.step()
        module.on_train_batch_end(None, None, number)
    module.eval()


def said_of(
    things: list[Thing], tokenize: CaptionTokenizer
) -> tuple[list[int], list[int], list[int], list[str]]:
    """Ids of the first caption, and position, cell and kind of its colour and shape words."""
    places: list[int] = []
    cells: list[int] = []
    kinds: list[str] = []
    ids = [49406]
    for number, thing in enumerate(things):
        for word in ("and",) * number + ("a",):
            ids += tokenize.encode(word)
        for kind, word in (("colour", thing.colour), ("shape", thing.shape)):
            pieces = tokenize.encode(word)
            places.append(len(ids))
            cells.append(thing.cell)
            kinds.append(f"{kind} {number + 1}")
            ids += pieces
    return [*ids, 49407], places, cells, kinds


@torch.no_grad()
def measured(module: LightCLIP, seed: int, count: int = 256) -> dict[str, float]:
    """Grounding, masked words, retrieval and zero-shot of held-out scenes, percent."""
    net, tokenize = module.network, CaptionTokenizer(LENGTH)
    pictures, things, captions = scenes(count, seed + 1000)
    images = module.normalize(pictures.float() / 255)
    maps = net.visual.maps(images)
    ids = tokenize([both[0] for both in captions])[0]
    v, t = F.normalize(net.visual.project(maps[-1]), dim=-1), module.encode_text(ids)
    score, own = v @ t.T, torch.arange(count)
    found = {
        "i2t R@1": (score.argmax(1) == own).double().mean().item() * 100,
        "t2i R@1": (score.argmax(0) == own).double().mean().item() * 100,
        "zero-shot": zero_shot(module, tokenize, seed),
    }
    spoken = [said_of(each, tokenize) for each in things]
    hidden = net.text_hidden(ids)
    assert torch.equal(end_positions(ids, net.end), torch.tensor([len(each[0]) - 1 for each in spoken]))
    if net.token_align is not None:
        patches, words = net.token_align.patches(maps[-1]), net.token_align.words(hidden)
        hits = [
            int((patches[row] @ words[row, place]).argmax()) == cell
            for row, (_, places, cells, _) in enumerate(spoken)
            for place, cell in zip(places, cells, strict=True)
        ]
        found["grounding"] = 100 * statistics.mean(hits)
    if net.mlm is not None:
        for number, kind in enumerate(("colour 1", "shape 1", "colour 2", "shape 2")):
            masked, at = ids.clone(), torch.tensor([each[1][number] for each in spoken])
            masked[own, at] = net.mask_id
            guess = net.word_logits(net.text_hidden(masked, maps)[own, at]).argmax(1)
            found[f"masked {kind}"] = (guess == ids[own, at]).double().mean().item() * 100
    return found


def zero_shot(module: LightCLIP, tokenize: CaptionTokenizer, seed: int) -> float:
    """Which of 32 single things a picture shows."""
    rng = np.random.default_rng((seed, 5))
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    classes = module.encode_text(tokenize(names)[0])
    labels = np.repeat(np.arange(len(names)), 4)
    drawn = [
        draw_things([Thing(list(COLOURS)[n // 4], SHAPES[n % 4], int(rng.integers(GRID**2)))], SIDE, rng)
        for n in labels
    ]
    images = torch.stack([pil_to_tensor(each) for each in drawn]).float() / 255
    guess = (module.encode_image(images) @ classes.T).argmax(1)
    return (guess == torch.from_numpy(labels)).double().mean().item() * 100


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and measure one; kept in a file."""
    path = options.runs / f"{name}-{seed}-{options.steps}.json".replace(" ", "_").replace(",", "")
    if not path.exists():
        start = time.process_time()
        seed_everything(seed, verbose=False)
        module = LightCLIP(NETWORK, **VARIANTS[name])
        train(module, options.steps, seed, options.size)
        report = {**measured(module, seed), "cpu_seconds": time.process_time() - start}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))
        print(f"  done: {path.stem}, {report['cpu_seconds']:.0f} s of CPU", flush=True)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=3000, help="training scenes")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=Path("runs/effects/lightclip"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            found[name].append(run(name, seed, options))
    columns = ["grounding", "masked colour 1", "masked colour 2", "masked shape 1", "masked shape 2"]
    columns += ["i2t R@1", "t2i R@1", "zero-shot"]
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, reports in found.items():
        cells = [spread([r[c] for r in reports], 1, 1) if c in reports[0] else "" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
