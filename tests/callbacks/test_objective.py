from copy import deepcopy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from callbacks import FeatureTaps, FrozenNetwork, ObjectiveCallback
from lightning_modules import ImageClassifier


class LogitNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, module, batch, outputs):
        return {"norm": self.scale * outputs["logits"].square().mean()}


class NormCallback(ObjectiveCallback):
    built = 0

    def build_objective(self, trainer, module):
        self.built += 1
        return LogitNorm()


def tiny():
    return ImageClassifier(
        "test_vit", 4, model_args={"img_size": 32}, optimizer=partial(torch.optim.SGD, lr=0.1)
    )


def test_objectives_live_for_one_fit_and_their_state_in_its_checkpoint(trainer, blob_data, tmp_path):
    module, plain = tiny(), tiny()
    callbacks = [NormCallback("first"), NormCallback("second")]
    run = trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    run.fit(module, datamodule=blob_data())
    assert {"train/first/norm", "train/second/norm"} <= set(run.logged_metrics)
    assert module.state_dict().keys() == plain.state_dict().keys()
    path = run.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved["objectives.first.scale"] != 1, "the objective's own parameter was trained"

    # test needs no callback
    trainer().test(plain, datamodule=blob_data(), ckpt_path=path, weights_only=True, verbose=False)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in module.state_dict().items())

    # a second fit goes on with the objective of the first
    trained = saved["objectives.first.scale"].item()
    trainer(max_steps=0, callbacks=callbacks[:1]).fit(module, datamodule=blob_data())
    assert callbacks[0].built == 1
    assert callbacks[0]._objective.scale.item() == pytest.approx(trained)


def test_a_run_that_broke_off_can_be_started_again(trainer, blob_data):
    class Fault(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            raise RuntimeError("broken")

    module, callback = tiny(), NormCallback("first")
    with pytest.raises(RuntimeError, match="broken"):
        trainer(callbacks=[callback, Fault()]).fit(module, datamodule=blob_data())
    trainer(callbacks=[callback], max_steps=1).fit(module, datamodule=blob_data())
    assert callback.built == 1
    assert not list(module.objectives)


def test_only_methods_take_objectives(trainer, blob_data):
    with pytest.raises(MisconfigurationException, match="NormCallback needs a Method"):
        NormCallback("x").setup(trainer(), LightningModule(), "fit")


def test_frozen_networks_are_no_modules_and_are_shared_by_copies():
    frozen = FrozenNetwork(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    holder = nn.Module()
    holder.teacher = frozen
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert deepcopy(holder).teacher is frozen
    assert not frozen(torch.ones(1, 2, requires_grad=True)).requires_grad
    frozen.network.train()
    with pytest.raises(RuntimeError, match="training mode"):
        frozen(torch.ones(1, 2))


def test_taps_keep_the_first_output_and_go():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    taps = FeatureTaps(network, ["0", "[2]"])
    first = network(torch.ones(1, 2))
    network(torch.zeros(1, 2))
    assert list(taps.outputs) == ["0", "2"]
    assert torch.equal(taps.outputs["2"], first)
    assert list(taps.take()) == ["0", "2"]
    assert not taps.outputs
    network(torch.ones(1, 2))
    assert len(taps.outputs) == 2
    network[0](torch.ones(1, 2))
    deepcopy(network)(torch.zeros(1, 2))
    assert torch.equal(taps.outputs["2"], first), "copies carry the hooks and record nothing"
    taps.remove()
    network(torch.ones(1, 2))
    assert not taps.outputs
    with pytest.raises(ValueError, match="feature taps: the pattern '7'"):
        FeatureTaps(network, ["7"])


def test_taps_of_each_pass_record_inside_of_it_only():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    taps = FeatureTaps(network, ["0"], each_pass=True)
    taps.tap("1", "last", takes_input=True)
    network[0](torch.ones(1, 2))
    assert not taps.outputs
    network(torch.ones(1, 2))
    second = network(torch.zeros(1, 2))
    recorded = taps.take()
    assert torch.equal(network[1](recorded["last"]), second), "the last pass counts"
    with pytest.raises(RuntimeError, match="gave no 0, last"):
        taps.take()


def test_averaging_must_come_after_what_joins_the_module(trainer, blob_data):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging must come after NormCallback"):
        trainer(callbacks=[EMAWeightAveraging(), NormCallback("x")]).fit(tiny(), datamodule=blob_data())
    trainer(callbacks=[NormCallback("x"), EMAWeightAveraging()]).fit(tiny(), datamodule=blob_data())
