"""What each part of LightCLIP adds, and which reading of its matching, on drawn scenes (section 8.2).

    python benchmarks/effects/lightclip.py [--seeds 0 1 2] [--steps 160] [--variants all ...] [--runs FOLDER]

Scenes of two coloured shapes in a 3 x 3 grid, so that a cell is a patch; captions say what is there and how
it lies. Grounding: share of colour and shape words of a held-out caption whose best patch is the object's
cell. Masked words: accuracy of a colour or shape word that is replaced by the mask. Retrieval R@1 and
zero-shot top-1 are of held-out scenes and of single things. CLIP's byte pairs are renumbered to those that
occur, which saves a third of the time. Runs that are there already are kept. Drawn data: photographs are in
`lightclip_photos.py`.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import spread, table
from lightning.pytorch import seed_everything
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from datamodules.person_retrieval.captions import CaptionTokenizer
from datamodules.samples.scenes import COLOURS, GRID, SHAPES, Thing, captions_of, draw_scene, draw_things
from lightning_modules.lightclip import LightCLIP, Matching, Softening

LENGTH, SIDE = 16, 48
TEXT = {"embed_dim": 64, "width": 64, "heads": 4, "layers": 4, "align_width": 64, "tie_head": True}
TRUNK = {"trunk": "test_resnet", "trunk_args": {"output_stride": 16}, "image_size": SIDE}
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


class Words:
    """CLIP's byte pairs, renumbered to those that occur in `captions`; the marks are the last two.

    Args:
        captions: all that will be read.
        length: tokens with both marks.
    """

    def __init__(self, captions: Sequence[str], length: int) -> None:
        self._tokenizer = CaptionTokenizer(length)
        self._known = self._tokenizer(captions)[0].unique()
        self.network = {"vocabulary": len(self._known), "context_length": length}
        self.network |= {"start": len(self._known) - 2, "end": len(self._known) - 1}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids (captions, length)."""
        return torch.searchsorted(self._known, self._tokenizer(captions)[0])

    def pieces(self, word: str) -> int:
        """How many tokens a word has."""
        return len(self._tokenizer.encode(word))


def train(
    module: LightCLIP, steps: int, seed: int, draw: Callable[[np.random.Generator], dict[str, Tensor]]
) -> None:
    """AdamW with one cycle on the batches of `draw`; the softening rises over the run."""
    rng = np.random.default_rng((seed, 3))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    end, kind = module.softening.end, module.softening
    module.train()
    for number in range(steps):
        module.softening = kind._replace(kind="constant", end=end * number / steps)
        given = draw(rng)
        optimizer.zero_grad()
        torch.stack(list(module.losses(module.compute(given), given).values())).sum().backward()
        optimizer.step()
        schedule.step()
        module.on_train_batch_end(None, None, number)
    module.eval()


def drawing(
    words: Words, seed: int, size: int, batch: int = 32
) -> Callable[[np.random.Generator], dict[str, Tensor]]:
    """Batches of training scenes, each with one of its captions."""
    pictures, _, captions = scenes(size, seed)
    ids = torch.stack([words([both[way] for both in captions]) for way in (0, 1)])

    def draw(rng: np.random.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(rng.choice(size, batch, replace=False))
        way = torch.from_numpy(rng.integers(0, 2, batch))
        return {"image": pictures[rows].float() / 255, "input_ids": ids[way, rows]}

    return draw


def said_of(things: list[Thing], words: Words) -> tuple[list[int], list[int]]:
    """Positions in the first caption, and cells, of colour and shape words."""
    places: list[int] = []
    cells: list[int] = []
    at = 1
    for number, thing in enumerate(things):
        at += sum(words.pieces(word) for word in ("and",) * number + ("a",))
        for word in (thing.colour, thing.shape):
            places.append(at)
            cells.append(thing.cell)
            at += words.pieces(word)
    return places, cells


@torch.no_grad()
def measured(module: LightCLIP, words: Words, seed: int, count: int = 256) -> dict[str, float]:
    """Grounding, masked words, retrieval and zero-shot of held-out scenes, percent."""
    net = module.network
    pictures, things, captions = scenes(count, seed + 1000)
    images = module.normalize(pictures.float() / 255)
    maps = net.visual.maps(images)
    ids = words([both[0] for both in captions])
    v, t = F.normalize(net.visual.project(maps[-1]), dim=-1), module.encode_text(ids)
    score, own = v @ t.T, torch.arange(count)
    found = {
        "i2t R@1": (score.argmax(1) == own).double().mean().item() * 100,
        "t2i R@1": (score.argmax(0) == own).double().mean().item() * 100,
        "zero-shot": zero_shot(module, words, seed),
    }
    spoken = [said_of(each, words) for each in things]
    hidden = net.text_hidden(ids)
    if net.token_align is not None:
        patches, said = net.token_align.patches(maps[-1]), net.token_align.words(hidden)
        hits = [
            int((patches[row] @ said[row, place]).argmax()) == cell
            for row, (places, cells) in enumerate(spoken)
            for place, cell in zip(places, cells, strict=True)
        ]
        found["grounding"] = 100 * statistics.mean(hits)
    if net.mlm is not None:
        for number, kind in enumerate(("colour 1", "shape 1", "colour 2", "shape 2")):
            masked, at = ids.clone(), torch.tensor([places[number] for places, _ in spoken])
            masked[own, at] = net.mask_id
            guess = net.word_logits(net.text_hidden(masked, maps)[own, at]).argmax(1)
            found[f"masked {kind}"] = (guess == ids[own, at]).double().mean().item() * 100
    return found


def things_by_name() -> list[str]:
    """All coloured shapes."""
    return [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def zero_shot(module: LightCLIP, words: Words, seed: int) -> float:
    """Which of 32 single things a picture shows."""
    rng = np.random.default_rng((seed, 5))
    names = things_by_name()
    classes = module.encode_text(words(names))
    labels = np.repeat(np.arange(len(names)), 4)
    drawn = [
        draw_things([Thing(list(COLOURS)[n // 4], SHAPES[n % 4], int(rng.integers(GRID**2)))], SIDE, rng)
        for n in labels
    ]
    images = torch.stack([pil_to_tensor(each) for each in drawn]).float() / 255
    guess = (module.encode_image(images) @ classes.T).argmax(1)
    return (guess == torch.from_numpy(labels)).double().mean().item() * 100


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and measure one."""
    words = Words([*things_by_name(), *(text for both in scenes(500, 0)[2] for text in both)], LENGTH)
    module = LightCLIP({**TRUNK, **TEXT, **words.network}, **VARIANTS[name])
    train(module, options.steps, seed, drawing(words, seed, options.size))
    return measured(module, words, seed)


Run = Callable[[str, int, argparse.Namespace], dict[str, float]]


def kept(run: Run, name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """What `run` found, which is kept in a file."""
    path = options.runs / f"{name}-{seed}-{options.steps}.json".replace(" ", "_").replace(",", "")
    if not path.exists():
        start = time.process_time()
        seed_everything(seed, verbose=False)
        report = {**run(name, seed, options), "CPU s": time.process_time() - start}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))
        print(f"  done: {path.stem}, {report['CPU s']:.0f} s of CPU", flush=True)
    return json.loads(path.read_text())


def parser_of(about: str | None, folder: str, steps: int) -> argparse.ArgumentParser:
    """What both experiments can be asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, default=Path("runs/effects") / folder)
    return parser


def compare(run: Run, columns: Sequence[str], options: argparse.Namespace) -> None:
    """All variants and seeds, and their table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            found[name].append(kept(run, name, seed, options))
    rows = [
        [name, *(spread([r[c] for r in reports], 1, 1) if c in reports[0] else "" for c in columns)]
        for name, reports in found.items()
    ]
    print(table(["", *columns], rows))


COLUMNS = ("grounding", "masked colour 1", "masked colour 2", "masked shape 1", "masked shape 2")


def main() -> None:
    parser = parser_of(__doc__, "lightclip", 160)
    parser.add_argument("--size", type=int, default=3000, help="training scenes")
    compare(run, (*COLUMNS, "i2t R@1", "t2i R@1", "zero-shot", "CPU s"), parser.parse_args())


if __name__ == "__main__":
    main()
