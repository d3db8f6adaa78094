"""Every bad input is an error that names the argument, or a sentence that names the layer."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from callbacks.pruning import MagnitudePruning, RankPruning, RigL
from callbacks.pruning.tensors import prunable_modules


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_sparsity", 1.0),
        ("target_sparsity", -0.1),
        ("rank_weight", -1.0),
        ("rank_tolerance", 0.0),
        ("rank_tolerance", 1.0),
        ("update_every", 0),
        ("prune_end", 0.0),
        ("prune_end", 0.95),  # beyond topology_end
        ("topology_end", 1.1),
        ("drop_fraction", 1.0),
        ("drop_fraction", -0.1),
        ("warmup", 1.0),
        ("total_steps", 0),
        ("distribution", "even"),
        ("schedule", "linear"),
        ("apply", "both"),
        ("rank_on", "attention"),
        ("svd_backend", "qr"),
    ],
)
def test_arguments_of_rank_pruning(option, value):
    named = "topology_end|prune_end" if option == "prune_end" else option
    with pytest.raises(MisconfigurationException, match=rf"({named}).*{value}"):
        RankPruning(**{"target_sparsity": 0.9, "rank_weight": 1.0} | {option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("topology_end", 0.0),
        ("drop_fraction", 1.0),
        ("distribution", "global"),
        ("initial_masks", "dense"),
        ("apply", "x"),
    ],
)
def test_arguments_of_rigl(option, value):
    with pytest.raises(MisconfigurationException, match=rf"{option}={value}"):
        RigL(**{"target_sparsity": 0.9} | {option: value})


def test_runs_that_are_too_short_say_what_they_need(train, tiny):
    with pytest.raises(MisconfigurationException, match="at least 200 steps"):
        train(tiny(), [MagnitudePruning(target_sparsity=0.9, update_every=100, prune_end=0.5)])
    with pytest.raises(MisconfigurationException, match="before step 30"):
        train(tiny(), [RigL(target_sparsity=0.9, update_every=100)])


def test_an_endless_run_is_refused_unless_its_length_is_given(train, tiny):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = True

    with pytest.raises(MisconfigurationException, match="max_epochs or trainer"):
        train(tiny(), [MagnitudePruning(target_sparsity=0.9)], max_epochs=-1)
    pruning = MagnitudePruning(target_sparsity=0.9, total_steps=500)
    with pytest.warns(UserWarning, match="ended at step 1 of 500 with density 1.0"):
        train(tiny(), [Stop(), pruning], max_epochs=-1)


def test_target_zero_warns_and_does_nothing(train, tiny):
    module = tiny()
    with pytest.warns(UserWarning, match="nothing is pruned"):
        train(module, [MagnitudePruning(target_sparsity=0.0)])
    assert all((parameter != 0).all() for parameter in module.parameters())


def test_fast_dev_run_prunes_nothing(train, tiny, caplog):
    with caplog.at_level("INFO"):
        train(tiny(), [MagnitudePruning(target_sparsity=0.9)], fast_dev_run=True)
    assert "nothing is pruned" in caplog.text


def test_sharded_strategies_are_refused(tiny):
    trainer = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[])
    with pytest.raises(MisconfigurationException, match="FSDPStrategy shards them"):
        RigL(target_sparsity=0.5).setup(trainer, tiny(), "fit")


def test_two_callbacks_on_one_layer_are_refused_and_on_two_work(train, tiny):
    one = {"target_sparsity": 0.5, "update_every": 4}
    with pytest.raises(MisconfigurationException, match=r"both prune network\.2\.weight"):
        train(tiny(), [MagnitudePruning(**one), RigL(include=["network.2"], **one)])
    convs, linear = MagnitudePruning(modules=["Conv2d"], **one), RigL(modules=["Linear"], **one)
    train(tiny(), [convs, linear])
    assert (len(convs.masks), len(linear.masks)) == (2, 1)


class Selection(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.encoder = nn.Linear(4, 6, bias=False)
        self.twin = nn.Linear(4, 6, bias=False)
        self.twin.weight = self.encoder.weight
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.objectives = nn.ModuleDict({"kd": nn.Linear(4, 4)})


def names(**options) -> list[str]:
    return list(prunable_modules(Selection(), **{"modules": ["Conv2d", "Linear"]} | options))


def test_selection(caplog):
    with caplog.at_level("INFO"):
        assert names() == ["stem.weight", "encoder.weight"]
    assert "Frozen layers are not pruned: frozen" in caplog.text
    assert "twin shares its weight with encoder" in caplog.text
    assert names(modules=["ConvTranspose2d", "Linear"]) == ["encoder.weight", "up.weight"]
    assert names(exclude=["enc*", "twin"]) == ["stem.weight"]
    assert names(include=["st?m"]) == ["stem.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["stm"]}, "include: the pattern 'stm' matches nothing.*stem"),
        ({"exclude": ["nothing"]}, "exclude: the pattern 'nothing'"),
        ({"modules": ["Conv9d"]}, "modules: 'Conv9d' is no layer"),
        ({"modules": []}, "modules: name at least one"),
        (
            {"modules": ["Conv3d"]},
            "modules: no module of type Conv3d; the types seen are BatchNorm2d, Conv2d",
        ),
        ({"modules": ["BatchNorm2d"]}, "No weight to prune.*the types seen are BatchNorm2d"),
        ({"include": ["frozen"]}, r"all selected layers are frozen \(frozen\)"),
    ],
)
def test_selection_errors(options, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        names(**options)


def test_computed_weights_are_refused_by_name():
    module = Selection()
    torch.nn.utils.parametrizations.weight_norm(module.stem)
    with pytest.raises(MisconfigurationException, match=r"stem\.weight is computed.*exclude: \['stem'\]"):
        prunable_modules(module, ["Conv2d"])
    module.lazy = nn.LazyLinear(3)
    with pytest.raises(MisconfigurationException, match=r"lazy\.weight has no shape yet"):
        prunable_modules(module, ["Linear"])


def test_frozen_and_tied_weights_in_a_fit(train, tiny):
    module = tiny()
    module.network[0].weight.requires_grad_(False)
    module.network[5] = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 48))
    module.network[5][2].weight = module.network[5][1].weight
    before = module.network[0].weight.clone()
    pruning = RankPruning(
        target_sparsity=0.9, rank_weight=1, rank_on="all", update_every=4, prune_end=0.5, topology_end=0.7
    )
    train(module, [pruning])
    assert list(pruning.masks) == ["network.2.weight", "network.5.1.weight", "network.6.weight"]
    assert torch.equal(module.network[0].weight, before)
    assert pruning.masks.density() == pytest.approx(0.1, abs=0.001)


class TwoOptimizers(LightningModule):
    """Manual optimisation: `critic` steps on every batch, `maker` on every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.maker = nn.Linear(192, 8), nn.Linear(192, 8)

    def validation_step(self, batch, batch_idx: int) -> None:
        self.log("val/loss", self.critic(batch[0].flatten(1)).mean())

    def training_step(self, batch, batch_idx: int) -> None:
        images = batch[0].flatten(1)
        for index, optimizer in enumerate(self.optimizers()):
            if index == 0 or batch_idx % 2:
                optimizer.zero_grad()
                layer = self.critic if index == 0 else self.maker
                self.manual_backward((layer(images) - 1).square().mean())
                optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9) for layer in (self.critic, self.maker)
        ]


def test_manual_optimisation_follows_the_owner_of_the_weights(train, exact_zeros):
    with pytest.raises(MisconfigurationException, match=r"2 optimisers.*0 has critic\.weight; .*1 has maker"):
        train(TwoOptimizers(), [MagnitudePruning(target_sparsity=0.5, update_every=4)])
    pruning = MagnitudePruning(target_sparsity=0.5, update_every=4, include=["maker"], total_steps=20)
    train(TwoOptimizers(), [pruning, exact_zeros(pruning)])
    assert pruning.step == 20
    assert pruning.masks.density() == pytest.approx(0.5, abs=1e-3)


def test_weights_without_an_optimiser_are_refused_by_name(train, tiny):
    module = tiny()
    module.configure_optimizers = lambda: torch.optim.SGD(module.network[0].parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException, match=r"No optimiser updates network\.2\.weight"):
        train(module, [MagnitudePruning(target_sparsity=0.5, update_every=4)])


def test_lbfgs_is_refused(train, tiny):
    module = tiny()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        train(module, [MagnitudePruning(target_sparsity=0.5, update_every=4)])


def test_a_layer_that_loses_everything_is_named_once(train, tiny):
    module = tiny()
    with torch.no_grad():
        module.network[6].weight.mul_(1e-6)

    def still(batch, batch_idx):  # the weights keep their sizes
        return 0 * sum(parameter.sum() for parameter in module.parameters())

    module.training_step = still
    pruning = RankPruning(
        target_sparsity=0.5,
        rank_weight=0.0,
        update_every=4,
        prune_end=0.5,
        topology_end=0.7,
        drop_fraction=0.0,
    )
    with pytest.warns(UserWarning, match=r"no weight is left in network\.6\.weight") as warnings:
        train(module, [pruning])
    assert sum("no weight is left" in str(warning.message) for warning in warnings) == 1
