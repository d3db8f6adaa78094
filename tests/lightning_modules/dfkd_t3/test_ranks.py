"""The terms of a batch are the same on two ranks as on one, and so is their gradient."""

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from lightning_modules.dfkd_t3 import GeneratorObjective, Weights, WrittenText


def on_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(terms(slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def terms(rows):
    """Values and the gradient of their sum, of some of eight texts."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 5, 11), (8, 3), (8, 3))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    logits, teacher, student = (tensor[rows].requires_grad_() for tensor in drawn)
    mask = torch.ones(8, 5, dtype=torch.bool)[rows]  # as many positions on each rank
    ids = logits.detach().argmax(-1)
    text = WrittenText(ids, mask, logits.softmax(-1), logits)
    objective = GeneratorObjective(weights=Weights(pairwise=0.5))
    found = objective.terms(objective.weights, teacher, student, text, text)
    gradients = torch.autograd.grad(sum(found.values()), (logits, teacher))
    return {name: value.detach() for name, value in found.items()}, gradients


def test_two_ranks_give_what_one_gives(tmp_path):
    start_processes(on_a_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole, gradients = terms(slice(0, 8))
    for name, value in whole.items():
        if name in ("balance", "token", "pairwise"):
            for values, _ in found:
                torch.testing.assert_close(values[name], value, atol=1e-6, rtol=1e-6)
        mean = (found[0][0][name] + found[1][0][name]) / 2
        torch.testing.assert_close(mean, value, atol=1e-6, rtol=1e-6)
    for place, gradient in enumerate(gradients):
        halves = torch.cat([part[place] for _, part in found]) / 2  # DDP takes the mean of the ranks
        torch.testing.assert_close(halves, gradient, atol=1e-8, rtol=1e-6)
