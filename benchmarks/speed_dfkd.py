"""The straight-through bridge of DFKD-T3 against the product of one-hot tokens and embedding it stands for.

    python benchmarks/speed.py dfkd [--batch 8] [--length 16] [--vocabulary 32128] [--repeats 5]

Both make relaxed tokens of the same logits, hand them as embeddings to a teacher and a student, and take the
gradient of a loss of both embeddings and of the token diversity: a generator's step without the networks. The
gradients are compared. Times are interleaved in one process; peaks come from processes of their own, which
have taken a step of two tokens before, with the peak of one that does no more than that taken off.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import clock, forget_peak, in_own_process, interleaved, peak_mebibytes, ratios, write_numbers
from torch import Tensor

from lightning_modules.dfkd_t3 import GeneratorObjective
from lightning_modules.dfkd_t3.bridge import Relaxation, embed_and_pass
from lightning_modules.dfkd_t3.losses import negative_entropy

Step = Callable[[], Tensor]


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Logits, noise, the embeddings of teacher and student, and what their losses weigh."""
    torch.manual_seed(0)
    shape = (options.batch, options.length, options.vocabulary)
    widths = (options.teacher_width, options.student_width)
    logits = torch.randn(shape, device=options.device).requires_grad_()
    embeddings = [torch.randn(options.vocabulary, width, device=options.device) for width in widths]
    wanted = [torch.randn(*shape[:2], width, device=options.device) for width in widths]
    return logits, torch.randn(shape, device=options.device), embeddings, wanted


def diversity(pi: Tensor) -> Tensor:
    mask = torch.ones(pi.shape[:2], dtype=torch.bool, device=pi.device)
    return negative_entropy(GeneratorObjective().mean_tokens(pi, mask))


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """One generator's step each way; gives the gradient of the logits."""
    logits, noise, embeddings, wanted = inputs(options)

    def loss_of(pi: Tensor, embedded: list[Tensor]) -> Tensor:
        pairs = zip(embedded, wanted, strict=True)
        return sum((value * weight).sum() for value, weight in pairs) + diversity(pi)

    def lookup() -> Tensor:
        pi, ids = Relaxation().relax(logits, 1.0, noise)
        embedded = []
        for weight in embeddings:
            value, pi = embed_and_pass(pi, ids, weight)
            embedded.append(value)
        return torch.autograd.grad(loss_of(pi, embedded), logits)[0]

    def product() -> Tensor:
        pi = (logits + noise).softmax(dim=-1)
        hard = F.one_hot(pi.argmax(dim=-1), options.vocabulary).to(pi.dtype)
        tokens = hard + pi - pi.detach()
        loss = loss_of(pi, [tokens @ weight for weight in embeddings])
        return torch.autograd.grad(loss, logits)[0]

    return {"lookup": lookup, "product": product}


def peak(options: argparse.Namespace, way: str) -> float:
    """Peak of a process that takes one step, or makes the inputs only."""
    line = ["--memory-of", way, "--batch", options.batch, "--length", options.length]
    line += ["--vocabulary", options.vocabulary, "--device", options.device]
    return float(in_own_process(__file__, *line, own_pages=True))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32128, help="T5's")
    parser.add_argument("--teacher-width", type=int, default=768, help="T5-base's")
    parser.add_argument("--student-width", type=int, default=512, help="T5-small's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    ways = steps(options)
    if options.memory_of:
        for small in steps(argparse.Namespace(**{**vars(options), "batch": 1, "length": 2})).values():
            small()  # what the libraries load and allocate once is neither way's
        forget_peak()
        if options.memory_of in ways:
            ways[options.memory_of]()
        print(peak_mebibytes())
        return 0
    first, second = (ways[name]() for name in ("lookup", "product"))
    difference = ((first - second).abs().max() / second.abs().max()).item()
    del first, second
    name, now = clock(options.device, 1)
    times = interleaved(ways, options.repeats, now)
    by_round = sorted(ratios(times["lookup"], times["product"]))
    base = peak(options, "inputs")
    memory = {way: peak(options, way) - base for way in ways}
    for way in ways:
        print(f"{way:<8} {statistics.median(times[way]):.3f} s ({name}), {memory[way]:.0f} MiB")
    print(f"time: {statistics.median(by_round):.2f} ({by_round[0]:.2f}-{by_round[-1]:.2f}) of the product's")
    print(f"peak memory: {memory['lookup'] / memory['product']:.2f}; gradients differ by {difference:.1e}")
    write_numbers(options.json, {"times": times, "memory": memory, "difference": difference})
    return 0


if __name__ == "__main__":
    sys.exit(main())
