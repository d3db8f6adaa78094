"""LightCLIP: what matching costs a step, the batched one-to-one solver, accumulation, and reading of shards.

    python benchmarks/speed.py lightclip [--what matching solver accumulation reading] [--scale 1]

Each is measured against what a user would do instead, in turns, in this run. On a CPU (`--device`) the step
of `matching` is timed with 8 pairs and multiplied, as towers cost the same for each pair, while the token
loss is timed at 256. `--scale` divides the batches of `accumulation` and the pairs of `solver`, and `--side`
makes the pictures of `accumulation` smaller; below 224 pixels the text tower is small too.
"""

import argparse
import io
import logging
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import in_own_process, interleaved, peak_mebibytes, ratios, write_numbers
from PIL import Image

from lightning_modules.lightclip import LightCLIP
from lightning_modules.lightclip.assignment import assign, assign_together
from lightning_modules.lightclip.losses import token_loss
from lightning_modules.lightclip.matching import token_scores


def synchronised(device: str) -> float:
    if device == "gpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(device: str) -> Callable[[], float]:
    return time.process_time if device == "cpu" else lambda: synchronised(device)


def batch(count: int, side: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Random pictures and captions of 8 to 16 words."""
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49000, (count, length), generator=stream)
    ends = torch.randint(9, 17, (count,), generator=stream).clamp(max=length - 1)
    place = torch.arange(length)
    ids = torch.where(place < ends[:, None], ids, 0)
    ids[:, 0] = 49406
    ids[torch.arange(count), ends] = 49407
    found = {"image": torch.rand(count, 3, side, side, generator=stream), "input_ids": ids}
    return {key: value.to(torch_device(device)) for key, value in found.items()}


def torch_device(device: str) -> str:
    return "cuda" if device == "gpu" else "cpu"


def build(device: str, side: int, length: int, **options: Any) -> LightCLIP:
    torch.manual_seed(0)
    small = {} if side == 224 else {"width": 64, "heads": 4, "embed_dim": 64, "layers": 4}
    network = {"trunk": "resnet18", "image_size": side, "context_length": length, **small}
    return LightCLIP(network, **options).to(torch_device(device))


def step(module: LightCLIP, given: dict[str, torch.Tensor]) -> None:
    """Forward and backward, as a mixed-precision run does it on a GPU."""
    module.zero_grad()
    device = given["image"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        sum(module.losses(module.compute(given), given).values()).backward()  # type: ignore[union-attr]


def ratio_of(name: str, slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Print and return the median of the rounds' ratios."""
    found = sorted(ratios(slow, fast))
    print(
        f"{name}: {statistics.median(found):.2f} ({found[0]:.2f}-{found[-1]:.2f}, {len(found)} rounds)",
        flush=True,
    )
    return {"ratio": statistics.median(found), "ratios": found, "slow": slow, "fast": fast}


def matching(options: argparse.Namespace) -> dict[str, Any]:
    """A step with the relaxed token loss over one without; batch 256, ResNet-18, 224 px."""
    few = 256 if options.device == "gpu" else 8
    module = build(options.device, 224, 77, w_tok=0, w_mlm=0)
    given = batch(few, 224, 77, options.device)
    ends = (batch(256, 32, 77, options.device)["input_ids"] == 49407).int().argmax(1)
    valid = (torch.arange(77, device=ends.device) > 0) & (
        torch.arange(77, device=ends.device) < ends[:, None]
    )
    shapes = ((256, 49, 512), (256, 77, 512))
    patches, words = (torch.randn(shape, device=ends.device, requires_grad=True) for shape in shapes)
    maps = [torch.nn.Linear(512, 256, bias=False, device=ends.device) for _ in shapes]

    def tokens() -> None:
        a, b = (F.normalize(m(x), dim=-1) for m, x in zip(maps, (patches, words), strict=True))
        token_loss(*token_scores(a, b, valid), valid.sum(1), 14.3).backward()

    calls = {"step": lambda: step(module, given), "tokens": tokens}
    times = interleaved(calls, options.repeats, clock(options.device))
    whole = [value * 256 / few for value in times["step"]]
    added = [value + more for value, more in zip(whole, times["tokens"], strict=True)]
    return ratio_of(f"matching: step of 256 with it over without ({few} timed)", added, whole)


def solver(options: argparse.Namespace) -> dict[str, Any]:
    """Scipy's solver pair by pair over the batched one, and over what is used; 49 patches, 30 words."""
    from scipy.optimize import linear_sum_assignment

    pairs = 64 * 64 if options.scale == 1 else 64 * 64 // options.scale
    stream = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(64, 49, 256, generator=stream), dim=-1)
    b = F.normalize(torch.randn(64, 30, 256, generator=stream), dim=-1)
    cosine = torch.einsum("ipd,jwd->ijpw", a, b).flatten(0, 1)[:pairs].to(torch_device(options.device))
    lengths = torch.full((pairs,), 30, device=cosine.device)

    def one_by_one() -> None:
        for matrix in cosine.cpu().numpy():
            linear_sum_assignment(matrix, maximize=True)

    calls = {"scipy": one_by_one, "batched": lambda: assign_together(cosine, lengths)}
    calls["used"] = lambda: assign(cosine, lengths)
    now = clock(options.device)
    times = interleaved(calls, options.repeats, now)
    problem = f"on {options.device}, {pairs} pairs of 49 x 30"
    return {
        way: ratio_of(f"solver: scipy over {said}, {problem}", list(times["scipy"]), list(times[way]))
        for way, said in (("batched", "all at once"), ("used", "what this device uses"))
    }


def accumulated(options: argparse.Namespace) -> dict[str, Any]:
    """Time of a large batch in parts over the undivided one, and memory over that of a small batch."""
    count, small = max(32, 1024 // options.scale), max(4, 128 // options.scale)
    side, length = options.side, 77 if options.side == 224 else 24
    whole = build(options.device, side, length)
    parts = build(options.device, side, length, micro_batch=small)
    given = batch(count, side, length, options.device)
    calls = {"whole": lambda: step(whole, given), "parts": lambda: step(parts, given)}
    times = interleaved(calls, options.repeats, clock(options.device))
    name = f"accumulation: {count} by {small} over undivided, {side} pixels, time"
    found = ratio_of(name, list(times["parts"]), list(times["whole"]))
    memory = {}
    for kind in ("parts", "small"):
        line = ["--memory-of", kind, "--device", options.device, "--scale", options.scale]
        memory[kind] = float(in_own_process(__file__, *line, "--side", options.side, own_pages=True))
    ratio = memory["parts"] / memory["small"]
    print(
        f"accumulation: {count} by {small} over a batch of {small}, peak memory: {ratio:.2f} ({memory})",
        flush=True,
    )
    return {**found, "memory_mebibytes": memory, "memory_ratio": ratio}


def peak(options: argparse.Namespace) -> float:
    """Peak of two steps, MiB: allocated on the device, or resident beyond what building takes."""
    count, small = max(32, 1024 // options.scale), max(4, 128 // options.scale)
    side, length = options.side, 77 if options.side == 224 else 24
    module = build(options.device, side, length, micro_batch=small if options.memory_of == "parts" else None)
    given = batch(count if options.memory_of == "parts" else small, side, length, options.device)
    if options.device == "gpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(module, given)
    return torch.cuda.max_memory_allocated() / 2**20 if options.device == "gpu" else peak_mebibytes()


def write_shards(folder: Path, pictures: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(pictures // 4):
                stream = io.BytesIO()
                coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
                coarse.resize((side, side)).save(stream, "JPEG", quality=90)
                for suffix, content in (
                    ("jpg", stream.getvalue()),
                    ("txt", b"a picture of a thing in a place"),
                ):
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second of our shards over what bare webdataset decodes and transforms alike."""
    import webdataset

    from datamodules import ImageTextDataModule, ImageTransforms

    count = 400
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_shards(root, count, 256)
        transforms = ImageTransforms(
            image_size=224, augmentation="none", crop_pct=1.0, interpolation="bicubic"
        )
        data = ImageTextDataModule(
            root=root, train="*.tar", transforms=transforms, batch_size=50, num_workers=0
        )
        data.prepare_data()
        data.setup("fit")
        resize, tokenize = transforms.evaluation(), data.tokenize

        def ours() -> None:
            assert sum(len(each["image"]) for each in data.train_dataloader()) == count

        def bare() -> None:
            pairs = webdataset.WebDataset(
                [str(file) for file in sorted(root.glob("*.tar"))], shardshuffle=False, empty_check=False
            )
            pairs = pairs.decode("pilrgb").to_tuple("jpg", "txt")
            pairs = pairs.map_tuple(resize, lambda text: tokenize([text])[0][0]).batched(50)
            seen = 0
            for image, _ in pairs:
                seen += len(image)
            assert seen == count

        times = interleaved({"ours": ours, "webdataset": bare}, options.repeats, time.process_time)
    return ratio_of(
        "reading: our pairs a second over bare webdataset's", list(times["webdataset"]), list(times["ours"])
    )


SUBJECTS = {"matching": matching, "solver": solver, "accumulation": accumulated, "reading": reading}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="divides batches")
    parser.add_argument("--side", type=int, default=224, help="pixels, of accumulation's pictures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory-of", choices=["parts", "small"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parsed()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak(options))
        return 0
    write_numbers(options.json, {name: SUBJECTS[name](options) for name in options.what})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
