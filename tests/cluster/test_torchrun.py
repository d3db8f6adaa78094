"""`cluster/torchrun.sh`: a worker that dies costs one restart, and no number changes."""

import pytest
import torch


@pytest.mark.timeout(1200)
def test_a_lost_worker_costs_one_restart(tmp_path, undisturbed, torchrun):
    arguments = ["--checkpoint.every_n_train_steps", "1", "--trainer.callbacks+", "probes.LoseRankAt"]
    arguments += ["--trainer.callbacks.step", "7", "--trainer.callbacks.folder", tmp_path]
    done = torchrun(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "attempts").read_text().split() == ["0", "1"]
    found, wanted = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (tmp_path, undisturbed)
    )
    assert found["global_step"] == wanted["global_step"] == 10
    for key, value in wanted["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key
