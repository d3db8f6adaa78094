import re
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, PolynomialLR, SequentialLR

from lightning_modules import ImageClassifier
from lightning_modules.base import Method
from lightning_modules.parts.reproducibility import derived_seed, seed_step
from lightning_modules.parts.schedules import WarmupSchedule
from lightning_modules.parts.weights import weights_origin


class Scale(Method):
    """Two loss terms of known value: 2 w and 3 w."""

    def __init__(self, plain=None, nested=None, **options):
        super().__init__(**options)
        self.network = nn.Sequential(nn.Linear(1, 1, bias=True), nn.LayerNorm(1))
        self.w = nn.Parameter(torch.tensor(1.0))
        self.poison_at = None
        self.draws = []

    def compute(self, batch):
        self.draws.append(torch.rand(1).item())
        return {"w": self.w, "unused": self.network(batch["image"].mean().view(1, 1))}

    def losses(self, outputs, batch):
        bad = float("nan") if self.poison_at == len(self.draws) - 1 else 1.0
        return {"double": 2 * outputs["w"] * bad, "triple": 3 * outputs["w"] + 0 * outputs["unused"].sum()}


class Quadruple(nn.Module):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.tensor(5.0))

    def forward(self, module, batch, outputs):
        return {"term": 4 * outputs["w"] * self.extra}


sgd = partial(torch.optim.SGD, lr=0.1)


def test_the_loss_is_the_sum_of_all_terms_and_each_is_logged(trainer, blob_data):
    module = Scale(optimizer=sgd)
    module.attach_objective("more", Quadruple())
    run = trainer(max_steps=1)
    run.fit(module, datamodule=blob_data())
    logged = {key: value.item() for key, value in run.logged_metrics.items()}
    expected = {"train/double": 2, "train/triple": 3, "train/more/term": 20, "train/loss": 25}
    assert logged == pytest.approx(expected)
    assert module.w.item() == pytest.approx(1 - 0.1 * 25)
    assert module.objectives["more"].extra.item() == pytest.approx(5 - 0.1 * 4)


def test_a_term_that_is_not_finite_stops_the_run_before_the_weights_change(trainer, blob_data):
    module = Scale(optimizer=sgd)
    module.poison_at = 2
    with pytest.raises(RuntimeError, match=r"double = nan, at batch 2 of BlobData \(memory\)"):
        trainer().fit(module, datamodule=blob_data())
    assert module.w.item() == pytest.approx(1 - 2 * 0.1 * 5, abs=1e-6)


def test_names_of_objectives_are_unique_and_plain():
    module = Scale()
    module.attach_objective("kd", Quadruple())
    with pytest.raises(MisconfigurationException, match="'kd' is attached already"):
        module.attach_objective("kd", Quadruple())
    with pytest.raises(MisconfigurationException, match=r"a\.b"):
        module.attach_objective("a.b", Quadruple())
    module.detach_objective("kd")
    assert not list(module.objectives)


class Two(Scale):
    optimizer_names = ("generator", "student")


def test_objectives_of_alternating_optimisers_join_the_loss_of_their_own():
    module = Two()
    module.log = module.log_dict = lambda *_, **__: None
    module._data_source = lambda: "nowhere"
    module.attach_objective("kd", Quadruple(), "student")
    outputs, losses = {"w": module.w}, {}
    module.losses = lambda outputs, batch: {"own": outputs["w"]}
    for optimizer in (*module.optimizer_names, None):
        losses[optimizer] = module.total_loss(outputs, {}, 0, optimizer).item()
    assert losses == {"generator": 1, "student": 21, None: 1}
    for optimizer, owner in (("critic", module), (None, module), ("student", Scale())):
        with pytest.raises(
            MisconfigurationException, match=f"'more' is for the optimiser {optimizer}, and those"
        ):
            owner.attach_objective("more", Quadruple(), optimizer)


def test_parameter_groups_by_rate_and_decay():
    module = Scale(
        optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
        lr_multipliers={"network.*": 0.1, "network.1.*": 0.2},
        no_decay=["network.0.weight"],
    )
    optimizer = module.configure_optimizers()
    found = {
        name: (round(group["lr"], 6), group["weight_decay"])
        for name, parameter in module.named_parameters()
        for group in optimizer.param_groups
        if any(parameter is member for member in group["params"])
    }
    assert found == {
        "w": (0.1, 0.5),
        "network.0.weight": (0.01, 0.0),
        "network.0.bias": (0.01, 0.5),
        "network.1.weight": (0.02, 0.5),
        "network.1.bias": (0.02, 0.5),
    }


def test_one_dimensional_parameters_can_go_without_decay():
    module = Scale(optimizer=partial(torch.optim.AdamW, weight_decay=0.5), decay_1d=False)
    decayed = [g for g in module.configure_optimizers().param_groups if g["weight_decay"] > 0]
    assert [tuple(p.shape) for group in decayed for p in group["params"]] == [(1, 1)]


@pytest.mark.parametrize(
    ("option", "value"), [("lr_multipliers", {"netwrok.*": 0.1}), ("no_decay", ["netwrok.*"])]
)
def test_a_glob_without_a_match_names_the_option(option, value):
    with pytest.raises(ValueError, match=rf"{option}: the pattern 'netwrok\.\*' matches nothing"):
        Scale(**{option: value}).configure_optimizers()


def test_frozen_parameters_stay_out_and_nothing_trainable_is_an_error():
    module = Scale(optimizer=sgd)
    module.network.requires_grad_(False)
    assert [len(group["params"]) for group in module.configure_optimizers().param_groups] == [1]
    module.w.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="no trainable parameter"):
        module.configure_optimizers()


def test_a_step_draws_the_same_numbers_wherever_the_run_started(trainer, blob_data):
    whole, part = Scale(optimizer=sgd), Scale(optimizer=sgd)
    trainer(max_epochs=1).fit(whole, datamodule=blob_data())
    torch.rand(17)
    trainer(max_epochs=1).fit(part, datamodule=blob_data())
    assert whole.draws == part.draws
    assert len(set(whole.draws)) == len(whole.draws)


def test_seeds_depend_on_every_part():
    seeds = {
        derived_seed(s, "step", e, b, r)
        for s in range(3)
        for e in range(3)
        for b in range(30)
        for r in range(3)
    }
    assert len(seeds) == 3 * 3 * 30 * 3
    seed_step(1, 2, 3)
    first = torch.rand(3)
    seed_step(1, 2, 3)
    assert torch.equal(first, torch.rand(3))


def test_checkpoints_are_plain_and_objectives_come_and_go(trainer, blob_data, tmp_path):
    module = Scale(optimizer=sgd)
    module.attach_objective("more", Quadruple())
    module.save_hyperparameters({"plain": 1, "function": sgd, "nested": {"a": [1, sgd], "path": tmp_path}})
    run = trainer(max_steps=1)
    run.fit(module, datamodule=blob_data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"plain": 1, "nested": {"a": [1], "path": str(tmp_path)}}
    assert "objectives.more.extra" in checkpoint["state_dict"]

    plain = Scale.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert plain.w.item() == module.w.item()

    other = Scale(optimizer=sgd)
    other.attach_objective("kd", Quadruple())
    with pytest.raises(MisconfigurationException, match=r"no state for the objectives \['kd'\]"):
        other.on_load_checkpoint(checkpoint)


def test_a_method_must_say_what_it_computes():
    with pytest.raises(MisconfigurationException, match=r"must define `compute"):
        Method().compute({})
    with pytest.raises(MisconfigurationException, match="must define `losses"):
        Method().losses({}, {})


adamw = partial(torch.optim.AdamW, lr=0.1)


@pytest.mark.parametrize(
    ("scheduler", "options", "said"),
    [
        (
            partial(WarmupSchedule, epochs=95),
            {},
            r"WarmupSchedule: its epochs makes it 95 epochs long.*has 3",
        ),
        (partial(CosineAnnealingLR, T_max=95), {}, r"CosineAnnealingLR: its T_max makes it 95 epochs long"),
        (
            partial(PolynomialLR, total_iters=7),
            {"lr_interval": "step"},
            r"total_iters.*7 optimiser steps.*has 12",
        ),
        (
            partial(OneCycleLR, max_lr=1.0, total_steps=40),
            {"lr_interval": "step"},
            r"total_steps.*40 optimiser",
        ),
        (partial(CosineAnnealingLR, T_max=3), {}, None),
        (partial(LinearLR, start_factor=0.1, total_iters=2), {}, None),
        (
            partial(LinearLR, start_factor=1, end_factor=0, total_iters=9),
            {},
            r"LinearLR: its total_iters makes it 9 epochs long, but this run has 3",
        ),
        (partial(OneCycleLR, max_lr=1.0, total_steps=13), {"lr_interval": "step"}, None),
        (partial(WarmupSchedule, epochs=2, warmup_epochs=1, warmup_prefix=True), {}, None),
        (partial(WarmupSchedule, warmup_epochs=1), {}, None),
        (partial(LinearLR, total_iters=2), {}, None),
        (
            lambda o: SequentialLR(o, [LinearLR(o, total_iters=1), CosineAnnealingLR(o, 2)], [1]),
            {},
            None,
        ),
        (
            lambda o: SequentialLR(o, [LinearLR(o, total_iters=1), CosineAnnealingLR(o, 8)], [1]),
            {},
            r"SequentialLR: its milestones and T_max makes it 9 epochs long, but this run has 3",
        ),
    ],
)
def test_a_schedule_of_another_length_than_the_run_is_announced(trainer, blob_data, scheduler, options, said):
    module = Scale(optimizer=sgd, lr_scheduler=scheduler, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=3).fit(module, datamodule=blob_data())
    found = [str(warning.message) for warning in caught if "the rate does not end" in str(warning.message)]
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


class Wider(Scale):
    def __init__(self, **options):
        super().__init__(**options)
        self.network = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda: Wider(optimizer=sgd),
            r"a.ckpt' is not of this Wider: .*of another shape: network.0.weight: \(1, 1",
        ),
        (lambda: Scale(optimizer=adamw), r"written with another optimizer: SGD, this run has AdamW"),
        (
            lambda: Scale(optimizer=sgd, lr_scheduler=partial(CosineAnnealingLR, T_max=2)),
            r"written with 0 learning rate schedules, and this run has 1",
        ),
        (lambda: Scale(optimizer=sgd, decay_1d=False), r"its groups have 5 tensors, those of this run 4, 1"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimiser_is_refused(trainer, blob_data, tmp_path, other, said):
    run = trainer()
    run.fit(Scale(optimizer=sgd), datamodule=blob_data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=said) as refusal:
        trainer(max_epochs=2).fit(other(), datamodule=blob_data(), ckpt_path=tmp_path / "a.ckpt")
    assert len(str(refusal.value)) < 500
    again = Scale(optimizer=sgd)
    trainer(max_epochs=2).fit(again, datamodule=blob_data(), ckpt_path=tmp_path / "a.ckpt")
    assert again.weights_origin == "trained"


def test_where_the_weights_are_from(trainer, blob_data, tmp_path):
    module = ImageClassifier("test_vit", 4, model_args={"img_size": 32})
    assert module.weights_origin == "random"
    run = trainer(max_steps=1)
    run.fit(module, datamodule=blob_data())
    assert module.weights_origin == "trained"
    run.save_checkpoint(tmp_path / "a.ckpt")
    args = ("test_vit", 4, tmp_path / "a.ckpt", {"img_size": 32})
    assert ImageClassifier(*args).weights_origin == f"file: {tmp_path / 'a.ckpt'}"
    assert weights_origin(module.network, "test_vit", "pretrained") == "random head on pretrained: test_vit"
    module.network.pretrained_cfg["num_classes"] = 4
    assert weights_origin(module.network, "test_vit", "pretrained") == "pretrained: test_vit"
