"""Two gloo processes: the weights, metrics and answers of one process."""

import json

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import distributed, multiprocessing

from datamodules.person_retrieval import PersonTransforms
from lightning_modules.cfam import LossSettings
from lightning_modules.parts.retrieval import RetrievalMetrics, ranking_scores, summary

EVERYTHING = LossSettings(temperature=0.07, id_weight=1.0)
IRRA = LossSettings(local_weight=0, match_weight=0, cid_weight=0, id_weight=1.0)


class Keep(Callback):
    """Writes every process's weights and metrics at the end."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def _write(self, trainer, module) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        kept = {"metrics": metrics, "weights": module.state_dict()}
        torch.save(kept, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module) -> None:
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._write(trainer, pl_module)


def processes(count):
    return {"strategy": "ddp_fork", "devices": count} if count > 1 else {}


@pytest.mark.parametrize(
    ("settings", "sampler"), [(EVERYTHING, "identity"), (IRRA, "random")], ids=["CFAM", "IRRA"]
)
def test_two_ranks_train_as_one_with_the_global_batch(
    settings, sampler, make_cfam, pedestrians, trainer, tmp_path
):
    for count in (1, 2):
        data = pedestrians(sampler=sampler, num_instances=2, batch_size=8 // count)
        options = {"max_steps": 5, "max_epochs": -1, "limit_val_batches": 0, **processes(count)}
        trainer(callbacks=[Keep(tmp_path)], **options).fit(make_cfam(settings), data)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    begun = make_cfam(settings).state_dict()
    moved = 0
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=2e-5)
        moved = max(moved, float((weight - begun[name]).abs().max()))
    assert moved > 1e-2, "the steps are far larger than what may differ"


@pytest.mark.parametrize("images", [1, 3])
def test_ranks_with_unequally_many_images_and_captions_measure_the_same(
    images, make_cfam, pedestrians, people, trainer, tmp_path
):
    file = "UFine6926_Annotations.json"
    records = [record for record in json.loads((people / file).read_text()) if record["split"] == "test"]
    records = [{**record, "captions": record["captions"][:1]} for record in records[:images]]
    (tmp_path / file).write_text(json.dumps(records))
    (tmp_path / "images").symlink_to(people / "images")
    for count in (1, 2):
        data = pedestrians(root=tmp_path, transforms=PersonTransforms((48, 16)))
        run = trainer(callbacks=[Keep(tmp_path)], **processes(count))
        run.validate(make_cfam(), data, verbose=False)
    one, first, second = (torch.load(tmp_path / f"{name}.pt")["metrics"] for name in ("1_0", "2_0", "2_1"))
    assert first == second == pytest.approx(one, rel=1e-6)
    assert set(one) == {f"val/{name}" for name in ("R1", "R5", "R10", "mAP", "mINP", "mSD")}


def _features():
    stream = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(30, 8, generator=stream, dtype=torch.float64), dim=1)
    queries = F.normalize(torch.randn(12, 8, generator=stream, dtype=torch.float64), dim=1)
    return {"gallery": (gallery, torch.arange(30) % 5), "queries": (queries, torch.arange(12) % 5)}


SHARES = {
    "uneven": {"gallery": ([*range(0, 30, 2), 1], [*range(1, 30, 2)]), "queries": ([*range(9)], [10, 11, 9])},
    "no queries": {"gallery": ([*range(20)], [*range(20, 30)]), "queries": ([*range(12)], [])},
    "no gallery": {"gallery": ([], [*range(30)]), "queries": ([*range(5)], [*range(5, 12)])},
    "apart": {"gallery": ([], [*range(30)]), "queries": ([*range(12)], [])},
    "nothing": {"gallery": ([], []), "queries": ([0], [1])},
}


def _measure(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, shares in SHARES.items():
        metrics = RetrievalMetrics(released=True)
        for side, (features, identity) in _features().items():
            rows = torch.tensor(shares[side][rank], dtype=torch.int64)
            if len(rows):
                metrics.update(side, features[rows], identity[rows], rows)
        found[name] = metrics.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_metrics_of_uneven_and_of_empty_ranks(tmp_path):
    multiprocessing.start_processes(_measure, (str(tmp_path),), nprocs=2, start_method="fork")
    sides = _features()
    whole = summary(ranking_scores(*sides["queries"], *sides["gallery"], released=True))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.pop("nothing") == {}
        for name, values in found.items():
            assert set(values) == set(whole), name
            for key, value in whole.items():
                torch.testing.assert_close(values[key], value, rtol=1e-12, atol=1e-10)
