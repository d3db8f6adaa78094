import os
import socket
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("two_ranks", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_a_rank(rank, script, out, shared):
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    script.main(out)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(script, tmp_path_factory) -> list[dict]:
    """What two processes saved, by rank."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    start_processes(on_a_rank, (script, out, shared), nprocs=2, start_method="fork")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_gathering_and_its_gradient(ranks):
    for rank, states in enumerate(ranks):
        assert states["gather"]["all"][:, 0].tolist() == [0, 0, 1, 1]
        # both ranks hold the same loss: their gradients add up, and DDP's mean divides them again
        assert states["gather"]["grad"][:, 0].tolist() == [2 * (2 * rank), 2 * (2 * rank + 1)]


def test_rows_of_ranks_that_have_unequal_numbers_of_them(ranks):
    for states in ranks:
        found = states["uneven"]
        assert found["gathered"].tolist() == [4, 0, 2, 1, 4]
        assert found["rows"].tolist() == [0, 1, 2, 4]
        assert found["columns"][:, 0].tolist() == [0, 11, 20, 40], "rank 0's row of what both have"
        assert found["none"].shape == (0, 2)
        assert found["once"].tolist() == [[0, 0], [1, 11], [2, 20], [4, 40]]
        assert found["raised"], "what fails on rank 0 fails everywhere, and nobody waits"


@pytest.mark.parametrize("name", ["rkd", "cc", "dist"])
def test_two_ranks_train_as_one_with_the_global_batch(name, ranks, script, tmp_path):
    alone = script.distil(script.criteria()[name], 1, tmp_path)
    for states in ranks:
        assert set(states[name]) == set(alone)
        for key, value in alone.items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-8, atol=1e-10)


def test_crd_banks_are_equal_on_all_ranks_and_hold_every_ranks_updates(ranks):
    first, second = (states["crd"] for states in ranks)
    prefix = "objectives.crd.criteria.crd."
    assert prefix + "contrast.memory_v1" in first
    assert all(torch.equal(first[key], second[key]) for key in first)
    for bank in ("memory_v1", "memory_v2"):
        entries = first[f"{prefix}contrast.{bank}"]
        # unlike the first entries, updated ones have unit norm: every sample was seen by one of the ranks
        torch.testing.assert_close(entries.norm(dim=1), torch.ones(len(entries)).double())
    assert first[prefix + "contrast.labels"].tolist() == [index % 4 for index in range(16)]
    assert (first[prefix + "contrast.params"][2:4] > 0).all()
    assert (ranks[1]["synchronised"]["memory_v2"] == 0).all()  # as rank 0 has it
