"""Orders of an epoch for losses that compare samples within a batch."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor

from datamodules.loading import EpochSampler, hash_seed


class IdentitySampler(EpochSampler):
    """Batches of P identities with K samples each, over all ranks together (P x K; Hermans et al. 2017).

    Each identity's samples are drawn without replacement in groups of K, and its last group is filled with
    samples that it had before. A batch takes a group of each of P identities, those with the most groups
    left, so that as few groups as possible are left over at the end of an epoch, and every epoch has equally
    many batches; then the batches are shuffled. As in `EpochSampler` all is a function of seed and epoch, an
    epoch can be entered anywhere, and N ranks see together what one would see.

    Args:
        identities: of the samples of a data set, in their order.
        identities_per_batch: P, on all ranks together.
        samples_per_identity: K; the loader's batch size is P x K divided by the number of ranks.
        seed: of the order.
        rank: of this process; from torch.distributed when None.
        num_replicas: number of ranks; from torch.distributed when None.

    Raises:
        MisconfigurationException: there are fewer than P identities, or the ranks do not divide P x K.
    """

    def __init__(
        self,
        identities: Sequence[int],
        identities_per_batch: int,
        samples_per_identity: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        names, numbers = np.unique(np.asarray(identities), return_inverse=True)
        self.identities_per_batch = identities_per_batch
        self.samples_per_identity = samples_per_identity
        self._members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
        self._groups = np.array([-(-len(rows) // samples_per_identity) for rows in self._members])
        if len(names) < identities_per_batch:
            raise MisconfigurationException(
                f"identities_per_batch: {identities_per_batch}, but the training data have {len(names)}."
            )
        batch = identities_per_batch * samples_per_identity
        batches = sum(1 for _ in self._drawn(np.zeros(len(names))))
        super().__init__(range(batches * batch), seed=seed, tail="drop", rank=rank, num_replicas=num_replicas)
        if batch % self.num_replicas:
            raise MisconfigurationException(
                f"{identities_per_batch} identities with {samples_per_identity} samples each cannot be "
                f"divided among {self.num_replicas} ranks."
            )

    def _drawn(self, luck: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
        """The identities (P,) of one batch after another; `luck` in [0, 1) decides between equals."""
        left, count = self._groups.astype(np.float64), self.identities_per_batch
        while True:
            most = np.argpartition(-(left + luck), count - 1)[:count]
            if left[most].min() < 1:
                return
            left[most] -= 1
            yield most

    def _order(self, length: int) -> Tensor:
        rng = np.random.default_rng(hash_seed(self.seed, self.epoch))
        size = self.samples_per_identity
        groups = [_in_groups(rows, size, rng) for rows in self._members]
        taken = np.zeros(len(groups), np.int64)
        batches = []
        for identities in self._drawn(rng.random(len(groups))):
            batches.append([groups[identity][taken[identity]] for identity in identities])
            taken[identities] += 1
        order = np.array(batches)[rng.permutation(len(batches))]  # (batches, P, K)
        return torch.from_numpy(order.reshape(length))


def _in_groups(rows: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(groups, size): shuffled; the last group is filled with rows of the others, or the same ones again."""
    shuffled = rng.permutation(rows)
    return np.resize(shuffled, (-(-len(rows) // size), size))
