"""Two gloo processes: the same integers on both, and those of one process with the whole batch."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import CBQ, GPTQ
from callbacks.quantization.ranks import share_of


class Keep(Callback):
    """Writes what every process has at the end."""

    def __init__(self, quantizer, folder) -> None:
        self.quantizer, self.folder = quantizer, folder

    def on_test_end(self, trainer, pl_module) -> None:
        integers = {name: matrix.integers for name, matrix in self.quantizer.matrices.items()}
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        name = f"{trainer.world_size}_{trainer.global_rank}.pt"
        torch.save({"integers": integers, "metrics": values}, self.folder / name)


@pytest.mark.parametrize("method", ["cbq", "gptq"])
def test_two_processes_equal_one(method, make_model, tokens, trainer, tmp_path):
    def run(processes: int) -> None:
        options = {"bits": 3, "group_size": 32, "batch_size": 8 // processes}
        if method == "cbq":
            # one batch is the whole set, so that both runs see the same batches
            quantizer = CBQ(
                **options,
                epochs=6,
                rounding_rank=5,
                cfp_weights=False,
                cfp_activations=True,
                activation_bits=8,
            )
        else:
            quantizer = GPTQ(**options, damp=0.1)
        strategy = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {}
        folder = tmp_path / str(processes)
        run = trainer(
            callbacks=[quantizer, Keep(quantizer, tmp_path)], default_root_dir=str(folder), **strategy
        )
        run.test(make_model(), tokens, verbose=False)

    run(1)
    run(2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["test/tokens"] == one["metrics"]["test/tokens"]
    assert first["metrics"]["test/nll"] == pytest.approx(one["metrics"]["test/nll"], rel=1e-2)
    same = []
    for name, integers in one["integers"].items():
        assert torch.equal(first["integers"][name], second["integers"][name])
        same.append((first["integers"][name] == integers).float().mean())
    assert torch.stack(same).mean() > 0.99, "only float noise at thresholds may differ"
    assert json.loads((tmp_path / "2" / f"{method}_report.json").read_text())["calibration_segments"] == 8


def test_the_rest_of_a_division_is_left_out(segments, monkeypatch):
    import callbacks.quantization.ranks as ranks

    monkeypatch.setattr(ranks, "rank_and_world", lambda: (1, 3))
    with pytest.warns(UserWarning, match="2 of 8 calibration segments are left out"):
        assert torch.equal(share_of(segments), segments[[1, 4]])
    with pytest.raises(ValueError, match="2 calibration segments are too few for 3 ranks"):
        share_of(segments[:2])
