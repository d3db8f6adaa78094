"""A training step of TinySAM on cached embeddings of its teacher against one with the teacher's encoder.

    python benchmarks/speed.py tinysam_train [--teacher samvit_base_patch16] [--image-size 1024] [--prompts 4]

Both steps are whole: student, prompts, the teacher's decoder, losses, backward pass and Adam, on equal
weights; the turns are interleaved. Only the encoder differs, so the ratio depends on the prompts of an image
and on the rounds of hard prompts: `--count` prints what it is in multiply-accumulates.
"""

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from common import clock, markdown, ratios, turns, write_numbers

from callbacks.distillation.base import FrozenTeacher
from callbacks.distillation.sam import SAMAnswers, SAMTeacher
from lightning_modules import TinySAMModule
from lightning_modules.tinysam import SAM, HardPrompts
from lightning_modules.tinysam.network import sam_vit

STUDENT, DECODER = 38.77, 1.812
TEACHERS = {"samvit_base_patch16": 486.0, "samvit_large_patch16": 1492.8, "samvit_huge_patch16": 2980.5}
"""Giga multiply-accumulates at 1024 pixels: of TinyViT-5M, of the decoder for a prompt, of SAM's encoders."""


def batch_of(options: argparse.Namespace) -> dict[str, Any]:
    """One image with the masks of its prompts: squares here and there."""
    side, count = options.image_size, options.prompts
    masks = torch.zeros(count, side // 4, side // 4, dtype=torch.bool)
    for place in range(count):
        start = (place * side // 4) // (2 * count)
        masks[place, start : start + side // 16, start : start + side // 16] = True
    return {
        "image": torch.rand(1, 3, side, side),
        "size": torch.tensor([[side, side]]),
        "masks": masks,
        "owner": torch.zeros(count, dtype=torch.int64),
    }


class Step:
    """A training step without a Trainer, so that nothing else is timed."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.module = TinySAMModule(
            SAM(options.image_size), prompts=HardPrompts(enabled=False), prompts_per_chunk=options.chunk
        ).to(options.device)
        callback = SAMTeacher(options.teacher)
        answers = SAMAnswers(sam_vit(options.teacher, options.image_size)).to(options.device)
        callback._frozen = self.teacher = FrozenTeacher(answers, options.teacher)
        self.objective = callback.build_objective(None, self.module)  # type: ignore[arg-type]
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-6)
        self.online = {name: value.to(options.device) for name, value in batch_of(options).items()}
        with torch.no_grad():
            picture = torch.ones_like(self.online["image"][:, 0])
            embedding = answers.embed(self.online["image"], picture)
        self.cached = {**self.online, "embedding": embedding, "cached": torch.ones(1, dtype=torch.bool)}

    def __call__(self, way: str) -> float:
        """The loss, after one step."""
        batch: dict[str, Any] = getattr(self, way)
        outputs = self.module.compute(batch)
        terms = {**self.module.losses(outputs, batch), **self.objective(self.module, batch, outputs)}
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.teacher.forget()
        return loss.item()


def counted() -> str:
    """Cached over online, in multiply-accumulates at 1024 pixels: forward, twice that backward."""
    rows = []
    for prompts in (4, 8, 16, 64):
        for rounds in (0, 4.5):
            cached = 3 * STUDENT + prompts * DECODER * (3 + 1 + rounds)
            cells = [f"{cached / (cached + encoder):.2f}" for encoder in TEACHERS.values()]
            rows.append([f"{prompts} prompts, {rounds} rounds", f"{cached:.0f}", *cells])
    return markdown(["", "cached, G", *TEACHERS], rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--teacher", default="samvit_base_patch16", help="of timm; random weights cost the same"
    )
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--chunk", type=int, help="prompts decoded at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--count", action="store_true", help="print the ratios of multiply-accumulates, and no more"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    if options.count:
        print(counted())
        return 0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    step, (unit, now) = Step(options), clock(options.device, 1)
    times: dict[str, list[float]] = {"online": [], "cached": []}
    losses: dict[str, float] = {}
    for way in turns(list(times), options.repeats):
        start = now()
        losses[way] = step(way)
        times[way].append(now() - start)
        print(f"  {way}: {times[way][-1]:.1f} s, loss {losses[way]:.4f}", flush=True)
    by_round = ratios(times["cached"], times["online"])
    ratio = statistics.median(times["cached"]) / statistics.median(times["online"])
    spread = f"{min(by_round):.2f}-{max(by_round):.2f}"
    print(f"{options.teacher} at {options.image_size} pixels, {options.prompts} prompts, {unit}")
    print(f"cached / online: {ratio:.2f} ({spread}, {options.repeats} repeats)")
    write_numbers(options.json, {"seconds": times, "ratio": ratio, "ratios": by_round})
    return 0


if __name__ == "__main__":
    main()
