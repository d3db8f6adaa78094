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


def seed_step(epoch: int, batch_idx: int, rank: int) -> None:
    """Seed torch, numpy and python for one training step on one rank."""
    seed = derived_seed(run_seed(), "step", epoch, batch_idx, rank)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm mixes with the legacy generator)
