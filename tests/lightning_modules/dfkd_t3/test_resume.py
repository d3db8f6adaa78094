"""A run that stopped at any step goes on to the very same weights: replay buffer, temperature, rates."""

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import DataFreeTeacher, ExactResume
from lightning_modules import Relaxation, Schedule


class Saver(Callback):
    """Writes a checkpoint after some steps, as a run that is killed then leaves it."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, module, *_):
        if module.steps_done in self.steps:
            trainer.save_checkpoint(self.folder / f"{module.steps_done}.ckpt")


@pytest.mark.parametrize("t5", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(distillation, data, fitted, teacher, tmp_path, t5):
    stops = (2, 5)

    def run(callbacks=(), resume=None):
        decoding = "autoregressive" if t5 else "parallel"
        schedule = Schedule(steps=7, warm_start=3, warmup=2, decay="linear", warm_start_lr=3e-3)
        module = distillation(t5=t5, relaxation=Relaxation(tau1=0.5, decoding=decoding), schedule=schedule)
        given = [DataFreeTeacher(weights=teacher), ExactResume(), *callbacks]
        fitted(module, data(), resume=resume, callbacks=given)
        return module

    whole = run([Saver(tmp_path, stops)])
    for stop in stops:
        torch.manual_seed(stop)
        resumed = run(resume=tmp_path / f"{stop}.ckpt")
        assert resumed.steps_done == 7
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (stop, name)
        ours, theirs = whole.replay.state_dict(), resumed.replay.state_dict()
        assert [a.tolist() for a in ours["ids"]] == [b.tolist() for b in theirs["ids"]]


def test_a_complete_run_is_not_prolonged(distillation, data, fitted, tmp_path):
    module = distillation()
    run = fitted(module, data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = distillation()
    fitted(again, data(), resume=tmp_path / "last.ckpt", max_epochs=3)
    assert again.steps_done == 3
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
