"""Random state as a pure function of where the run is, so that a resumed run repeats nothing and loses
nothing.
"""

import os
import random
import zlib

import numpy as np
import torch


def run_seed() -> int:
    """The seed that `seed_everything` was called with; 0 when it was not."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derived_seed(*parts: int | str) -> int:
    """A 32-bit seed from any numbers and names; the same parts give the same seed on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def seed_torch(seed: int) -> None:
    """What `torch.manual_seed` does, without its cost on machines whose accelerators are not in use.

    For every accelerator that is not initialised yet, `torch.manual_seed` formats the call stack into a
    deferred call: a millisecond a step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    if torch.xpu.is_initialized():
        torch.xpu.manual_seed_all(seed)


def seed_step(epoch: int, batch_idx: int, rank: int) -> None:
    """Seed torch, numpy and python for one training step on one rank."""
    seed = derived_seed(run_seed(), "step", epoch, batch_idx, rank)
    seed_torch(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm mixes with the legacy generator)
