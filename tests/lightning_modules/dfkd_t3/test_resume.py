"""A run that stopped at any step goes on to the very same weights: replay buffer, temperature, rates."""

import pytest
import torch

from callbacks import DataFreeTeacher, ExactResume
from lightning_modules import Relaxation, Schedule


@pytest.mark.parametrize("t5", [False, True])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_is_the_uninterrupted_one(distillation, data, fitted, teacher, tmp_path, t5, stop):
    def make():
        decoding = "autoregressive" if t5 else "parallel"
        schedule = Schedule(steps=7, warm_start=3, warmup=2, decay="linear", warm_start_lr=3e-3)
        return distillation(t5=t5, relaxation=Relaxation(tau1=0.5, decoding=decoding), schedule=schedule)

    def callbacks():
        return [DataFreeTeacher(weights=teacher), ExactResume()]

    whole = make()
    fitted(whole, data(), callbacks=callbacks())
    first, options = make(), {"limit_train_batches": 8}
    run = fitted(first, data(), callbacks=callbacks(), max_steps=_optimiser_steps(stop))
    assert first.steps_done == stop
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    second = make()
    fitted(second, data(), resume=tmp_path / "stopped.ckpt", callbacks=callbacks(), **options)
    assert second.steps_done == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    ours, theirs = whole.replay.state_dict(), second.replay.state_dict()
    assert [a.tolist() for a in ours["ids"]] == [b.tolist() for b in theirs["ids"]]


def _optimiser_steps(batches):
    """Three batches of copying take one step each, the others two."""
    return batches if batches <= 3 else 3 + 2 * (batches - 3)


def test_a_complete_run_is_not_prolonged(distillation, data, fitted, tmp_path):
    module = distillation()
    run = fitted(module, data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = distillation()
    fitted(again, data(), resume=tmp_path / "last.ckpt", max_epochs=3)
    assert again.steps_done == 3
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
