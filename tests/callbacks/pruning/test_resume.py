"""An interrupted and resumed run ends as the uninterrupted one, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.pruning import MagnitudePruning, RankPruning, RigL


def rank(**options) -> RankPruning:
    defaults = {
        "target_sparsity": 0.8,
        "rank_weight": 2.0,
        "update_every": 3,
        "prune_end": 0.5,
        "topology_end": 0.7,
    }
    return RankPruning(**defaults | options)


KINDS = {
    "magnitude": lambda: MagnitudePruning(target_sparsity=0.8, update_every=3, prune_end=0.5),
    "rank, step": rank,
    "rank, growth_only": lambda: rank(apply="growth_only"),
    "rank, erk": lambda: rank(distribution="erk", schedule="cosine"),
    "rigl": lambda: RigL(target_sparsity=0.8, update_every=3),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_resumed_is_uninterrupted(kind, train, tiny, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    whole, module = KINDS[kind](), tiny("adamw")
    train(module, [whole, checkpoint], enable_checkpointing=True)
    for epoch in (1, 3):  # step 16: amid the schedule; step 32: masks are fixed
        assert whole.plan.topology_end_step < 32
        resumed, again = KINDS[kind](), tiny("adamw", seed=9)
        train(again, [resumed], ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.masks.checksum() == whole.masks.checksum()
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, module.get_parameter(name)), name
        assert resumed.state_dict()["history"] == whole.state_dict()["history"]
        assert resumed.step == 40


def test_checkpoint_is_plain_and_small(train, tiny, tmp_path):
    pruning = rank()
    trainer = train(tiny(), [pruning])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][pruning.state_key]
    assert saved["masks"]["network.2.weight"]["bits"].numel() == 864 // 8
    assert saved["settled"] is True
    assert saved["configuration"]["target_sparsity"] == 0.8
    assert saved["timetable"] == {
        "total_steps": 40,
        "update_every": 3,
        "prune_end_step": 20,
        "topology_end_step": 28,
    }


def test_changed_settings_keep_the_saved_schedule_and_warn(train, tiny, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    train(tiny(), [rank(), checkpoint], enable_checkpointing=True)
    changed = rank(target_sparsity=0.5, update_every=4)
    with pytest.warns(
        UserWarning, match=r"target_sparsity=0\.5 \(saved: 0\.8\).*total_steps=48 \(saved: 40\)"
    ):
        train(tiny(), [changed], ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=6)
    assert changed.masks.density() == pytest.approx(0.2, abs=0.002)
    assert changed.plan.total_steps == 40


def test_a_checkpoint_of_other_layers_is_refused(train, tiny, tmp_path):
    trainer = train(tiny(), [rank(exclude=["network.6"])], max_epochs=3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)
    other = rank()
    state["callbacks"][other.state_key] = next(iter(state["callbacks"].values()))
    torch.save(state, tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match=r"no saved mask for network\.6\.weight"):
        train(tiny(), [other], ckpt_path=tmp_path / "end.ckpt")
