"""Two gloo processes: equal masks on both, and equal to one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from lightning.pytorch import Callback

from callbacks.pruning import RankPruning
from callbacks.pruning.masks import MaskBook
from callbacks.pruning.rank_sweep import RankSweep


class Report(Callback):
    """Writes what every process has at the end."""

    def __init__(self, pruning: RankPruning, folder) -> None:
        self.pruning, self.folder = pruning, folder

    def on_train_end(self, trainer, module) -> None:
        weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        report = {"checksum": self.pruning.masks.checksum(), "weights": weights}
        torch.save(report, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")


@pytest.mark.parametrize("apply", ["step", "growth_only"])
def test_two_processes_equal_one(apply, train, tiny, tmp_path):
    def run(processes: int, batch_size: int) -> None:
        pruning = RankPruning(
            target_sparsity=0.8,
            rank_weight=2.0,
            rank_on="all",
            apply=apply,
            update_every=4,
            prune_end=0.6,
            topology_end=0.8,
        )
        options = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {}
        train(
            tiny(),
            [pruning, Report(pruning, tmp_path)],
            batch_size=batch_size,
            max_epochs=4,
            **options,
        )

    run(1, 16)
    run(2, 8)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert first["checksum"] == second["checksum"] == one["checksum"]
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-6)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    weights = {str(size): torch.randn(size, 180) for size in (150, 20, 1, 140)} | {"0": torch.zeros(4, 4)}
    truncations = RankSweep(0.2)(weights)
    masks = MaskBook(weights)
    if rank == 0:
        masks["20"] = weights["20"] > 0
    masks.synchronize()
    bases = {name: truncation.basis for name, truncation in truncations.items()}
    numbers = {name: (t.rank, t.tail, t.squared_norm, t.side) for name, t in truncations.items()}
    torch.save({"bases": bases, "numbers": numbers, "masks": masks.checksum()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_dealt_sweep_and_masks_are_the_same_on_both_processes(tmp_path):
    multiprocessing.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["numbers"] == second["numbers"]
    assert first["masks"] == second["masks"]
    torch.manual_seed(0)
    weights = {str(size): torch.randn(size, 180) for size in (150, 20, 1, 140)} | {"0": torch.zeros(4, 4)}
    alone = RankSweep(0.2)(weights)
    assert list(first["numbers"]) == list(alone) == ["150", "20", "1", "140"]
    for name, truncation in alone.items():
        assert torch.equal(first["bases"][name], truncation.basis)
        assert torch.equal(second["bases"][name], truncation.basis)
        assert first["numbers"][name][:3] == (truncation.rank, truncation.tail, truncation.squared_norm)
