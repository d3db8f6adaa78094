"""The golden mask schedules, run by a real Trainer: its hooks, optimiser and step counting."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from callbacks.pruning import MagnitudePruning, RankPruning
from callbacks.pruning.masks import pack
from callbacks.pruning.rank_loss import rank_loss
from callbacks.pruning.rank_sweep import RankSweep

DISTRIBUTIONS = {"global_magnitude": "global", "erk": "erk", "uniform_all": "uniform_all"}


def layer_of(shape: list[int]) -> nn.Module:
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], tuple(shape[2:]), bias=False)
    return nn.Linear(shape[1], shape[0], bias=False)


class Scripted(LightningModule):
    """No data: at iteration t the loss is the sum of products of the weights with scripted gradients."""

    def __init__(self, config: dict, fill) -> None:
        super().__init__()
        self.config, self.fill = config, fill
        for name, shape in config["layers"]:
            layer = layer_of(shape)
            layer.weight.data = fill.values(f"{name}.weight", tuple(shape))
            self.add_module(name, layer)

    def training_step(self, batch, batch_idx: int):
        terms = []
        for name, shape in self.config["layers"]:
            label = f"{self.config['tag']}.grad.{self.trainer.global_step}.{name}.weight"
            terms.append((getattr(self, name).weight * self.fill.inputs(label, tuple(shape))).sum())
        return torch.stack(terms).sum()

    def configure_optimizers(self):
        settings = {key: self.config[key] for key in ("lr", "momentum", "weight_decay")}
        return torch.optim.SGD(self.parameters(), **settings)


class Journal(Callback):
    """What the golden file tells of every update."""

    def __init__(self, pruning, config: dict) -> None:
        self.pruning, self.config = pruning, config
        self.updates: list[dict] = []
        self._rank_loss = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.before = {name: weight.detach().clone() for name, weight in self.pruning.weights.items()}
        losses = [
            rank_loss(weight, self.config["rank_tolerance"])[0]
            for weight in self.before.values()
            if weight.ndim == 4
        ]
        self._rank_loss = sum(losses) / len(losses)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step % self.config["update_every"] or step >= self.config["topology_end_step"]:
            return
        weights = self.pruning.weights
        # without a step, a weight is what it was, or 0 (masked, or cut and regrown at once)
        kept = all(((weight == self.before[name]) | (weight == 0)).all() for name, weight in weights.items())
        self.updates.append(
            {
                "step": step,
                "k": self.pruning.plan.update_index(step),
                "drop_fraction": self.pruning.drop_fraction_now(),
                "nnz": list(self.pruning.masks.counts().values()),
                "optimizer_stepped": not kept,
                "rank_loss": self._rank_loss,
                "masks_hex": [pack(self.pruning.masks[name]).numpy().tobytes().hex() for name in weights],
                "w_sum": [weight.sum().item() for weight in weights.values()],
                "w_abs_sum": [weight.abs().sum().item() for weight in weights.values()],
            }
        )


def pruning_for(config: dict, kind: type = RankPruning, **options):
    steps = config["total_steps"]
    common = {
        "target_sparsity": 1 - config["target_density"],
        "update_every": config["update_every"],
        "prune_end": config["prune_end_step"] / steps,
        "distribution": DISTRIBUTIONS[config["distribution"]],
        "schedule": "exponential" if config["distribution"] == "global_magnitude" else "cosine",
    }
    if kind is RankPruning:
        common |= {
            "rank_weight": config["rank_weight"],
            "rank_tolerance": config["rank_tolerance"],
            "topology_end": config["topology_end_step"] / steps,
            "drop_fraction": config["drop_fraction_0"],
            "apply": config["apply_mode"],
        }
    return kind(**common, **options)


def run(config: dict, fill, train_module, pruning) -> tuple[Scripted, Journal]:
    module, journal = Scripted(config, fill), Journal(pruning, config)
    train_module(module, [pruning, journal], config["total_steps"])
    return module, journal


@pytest.fixture
def train_module(tmp_path):
    from lightning.pytorch import Trainer

    def train(module, callbacks, steps: int) -> None:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=callbacks,
        )
        trainer.fit(module, DataLoader(torch.zeros(steps, 1), batch_size=1))

    return train


def compare(case: dict, module: Scripted, journal: Journal) -> None:
    pruning = journal.pruning
    assert [update["step"] for update in journal.updates] == [update["step"] for update in case["updates"]]
    for found, expected in zip(journal.updates, case["updates"], strict=True):
        for key in ("k", "nnz", "optimizer_stepped"):
            assert found[key] == expected.get(key, found[key]), (expected["step"], key)
        assert found["drop_fraction"] == pytest.approx(expected["drop_fraction"], rel=1e-8)
        assert found["rank_loss"] == pytest.approx(expected["rank_loss"], abs=1e-5)
        if "masks_hex" in expected:
            assert found["masks_hex"] == expected["masks_hex"], expected["step"]
            assert found["w_abs_sum"] == pytest.approx(expected["w_abs_sum"], rel=2e-5)
    final = case["final"]
    weights = pruning.weights
    assert list(pruning.masks.counts().values()) == final["nnz"]
    assert [pack(pruning.masks[name]).numpy().tobytes().hex() for name in weights] == final["masks_hex"]
    scale = [weight.abs().sum().item() for weight in weights.values()]
    assert scale == pytest.approx(final["w_abs_sum"], rel=2e-5)
    for weight, expected, size in zip(weights.values(), final["w_sum"], scale, strict=True):
        assert weight.sum().item() == pytest.approx(expected, abs=2e-5 * size)
    states = module.trainer.optimizers[0].state
    momenta = [states[weight]["momentum_buffer"].abs().sum().item() for weight in weights.values()]
    assert momenta == pytest.approx(final["momentum_abs_sum"], rel=2e-5)


@pytest.mark.parametrize("index", range(5))
def test_schedule_run_is_golden(golden, fill, train_module, index):
    case = golden["schedule_runs"][index]
    pruning = pruning_for(case["config"])
    compare(case, *run(case["config"], fill, train_module, pruning))


def test_magnitude_pruning_is_the_golden_gradual_run(golden, fill, train_module):
    case = next(run for run in golden["schedule_runs"] if run["config"]["tag"] == "rpg.v.gmp")
    config = case["config"]
    pruning = pruning_for(config, MagnitudePruning)
    pruning.drop_fraction_now = lambda: 0.0
    module, journal = run(config, fill, train_module, pruning)
    # its timetable ends with the last cut; the reference goes on with empty updates
    assert pruning.plan.topology_end_step < config["topology_end_step"]
    compare(case, module, journal)


def test_model_rank_loss_is_golden(golden, fill):
    for case in golden["model_rank_loss"]:
        convs = {
            name: fill.values(f"{name}.weight", tuple(shape))
            for name, shape in case["layers"]
            if len(shape) == 4
        }
        truncations = RankSweep(case["tolerance"])(convs)
        losses = [truncation.loss for truncation in truncations.values()]
        assert [truncation.rank for truncation in truncations.values()] == case["k"]
        assert sum(losses) / len(losses) == pytest.approx(case["loss"], abs=1e-5)
