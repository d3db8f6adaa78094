"""P x K batches: what is in them, on one rank and on several, from one epoch to the next."""

import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from datamodules.loading import ResumableLoader, SeededDataset
from datamodules.sampling import IdentitySampler

IDENTITIES = np.random.default_rng(0).permutation(np.repeat([5, 7, 8, 11, 20, 31], [1, 3, 4, 8, 9, 2]))


def rows(epoch=0, rank=0, world=1, start=0, seed=3, **options):
    sampler = IdentitySampler(IDENTITIES, 3, 4, seed=seed, rank=rank, num_replicas=world, **options)
    sampler.set_epoch(epoch)
    sampler.start_at(start)
    keys = list(sampler)
    assert {key[0] for key in keys} <= {epoch}
    return [key[1] for key in keys]


def test_batches_have_so_many_of_each_identity():
    order = np.array(rows())
    assert (
        len(order) == len(IdentitySampler(IDENTITIES, 3, 4)) == 3 * 12
    )  # 1, 1, 1, 2, 3, 1 groups: 3 batches
    for batch in IDENTITIES[order].reshape(-1, 3, 4):
        assert all(len(set(group)) == 1 for group in batch)
        assert len({group[0] for group in batch}) == 3
    counts = np.bincount(order, minlength=len(IDENTITIES))
    for identity, most in ((20, 2), (11, 1), (8, 1)):  # of 20's nine samples three come twice
        assert counts[identity == IDENTITIES].max() <= most


def test_the_order_is_a_function_of_seed_and_epoch():
    assert rows() == rows() != rows(epoch=1)
    assert rows() != rows(seed=4)
    assert len({len(rows(epoch)) for epoch in range(5)}) == 1


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_together_what_one_sees(world):
    parts = [rows(rank=rank, world=world) for rank in range(world)]
    assert [row for step in zip(*parts, strict=True) for row in step] == rows()
    assert rows(rank=1, world=world, start=2) == parts[1][2:]


def test_an_epoch_is_resumed_within():
    def loader():
        dataset = SeededDataset(IDENTITIES.tolist())
        return ResumableLoader(dataset, sampler=IdentitySampler(IDENTITIES, 3, 4, seed=1), batch_size=12)

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    next(iterator)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == whole[1:]


def test_what_cannot_be_is_refused():
    with pytest.raises(
        MisconfigurationException, match="identities_per_batch: 7, but the training data have 6"
    ):
        IdentitySampler(IDENTITIES, 7, 2)
    with pytest.raises(MisconfigurationException, match=r"3 identities with 4 samples each .* among 5 ranks"):
        IdentitySampler(IDENTITIES, 3, 4, rank=0, num_replicas=5)
