"""All three callbacks in real fits: exact zeros, densities, and Trainer features that must keep working."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from callbacks.pruning import MagnitudePruning, RankPruning, RigL

KINDS = {
    "magnitude": lambda **o: MagnitudePruning(**{"target_sparsity": 0.8, "update_every": 4} | o),
    "rank": lambda **o: RankPruning(
        **{"target_sparsity": 0.8, "rank_weight": 1.0, "rank_on": "all", "update_every": 4, "prune_end": 0.6}
        | {"topology_end": 0.8}
        | o
    ),
    "rigl": lambda **o: RigL(**{"target_sparsity": 0.8, "update_every": 4} | o),
}
KEPT = round(0.2 * (216 + 864 + 192))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_masked_weights_and_states_are_exactly_zero_after_every_step(
    kind, optimizer, train, tiny, exact_zeros
):
    pruning = KINDS[kind]()
    watch = exact_zeros(pruning)
    module = tiny(optimizer)
    trainer = train(module, [pruning, watch])
    assert pruning.step == trainer.global_step == 40
    # amsgrad has three states a weight; a skipped first step has none
    assert watch.checked >= 39 * 3 * (1 if optimizer == "sgd" else 3)
    assert sum(pruning.masks.counts().values()) == pytest.approx(KEPT, abs=3)
    assert watch.densities == sorted(watch.densities, reverse=True)
    assert (len(set(watch.densities)) > 3) == (kind != "rigl")
    zeros = sum(int((weight == 0).sum()) for weight in pruning.weights.values())
    assert zeros == pytest.approx(216 + 864 + 192 - KEPT, abs=3)
    assert not any(torch.signbit(weight[weight == 0]).any() for weight in pruning.weights.values())


@pytest.mark.parametrize("kind", list(KINDS))
def test_fit_ends_with_pictures(kind, train, tiny, tmp_path, drawing):
    train(tiny(), [KINDS[kind]()], max_epochs=3)
    for picture in ("pruning_schedule.png", "pruning_layers.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", list(KINDS))
def test_accumulation_clipping_and_half_precision(kind, train, tiny, exact_zeros):
    pruning = KINDS[kind](update_every=2)
    watch = exact_zeros(pruning)
    module = tiny()
    train(
        module,
        [pruning, watch],
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        precision="bf16-mixed",
    )
    assert pruning.step == 20
    assert pruning.masks.density() == pytest.approx(0.2, abs=0.003)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["rank", "rigl"])
def test_channels_last_and_true_half_precision(kind, train, tiny, exact_zeros):
    pruning = KINDS[kind]()
    module = tiny().to(memory_format=torch.channels_last)
    train(module, [pruning, exact_zeros(pruning)], precision="bf16-true")
    assert module.network[0].weight.dtype == torch.bfloat16
    assert pruning.masks.density() == pytest.approx(0.2, abs=0.003)


class Snapshots(Callback):
    """Parameters before and after every batch, and the gradient norm that the optimiser saw."""

    def __init__(self) -> None:
        self.still: list[bool] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.before = [parameter.detach().clone() for parameter in module.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        pairs = zip(module.parameters(), self.before, strict=True)
        self.still.append(all(((now == old) | (now == 0)).all() for now, old in pairs))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("apply", "fraction", "skips"), [("growth_only", 0.3, True), ("step", 0.3, False)])
def test_growth_only_skips_the_optimiser_at_updates(apply, fraction, skips, optimizer, train, tiny):
    pruning = KINDS["rank"](apply=apply, drop_fraction=fraction)
    snapshots = Snapshots()
    train(tiny(optimizer), [snapshots, pruning], gradient_clip_val=1.0)
    updates = [pruning.plan.is_due(step) for step in range(1, 41)]
    assert sum(updates) == 7
    assert snapshots.still == [update and skips for update in updates]


def test_growth_only_without_growth_always_steps(train, tiny):
    snapshots = Snapshots()
    train(tiny(), [snapshots, KINDS["rank"](apply="growth_only", drop_fraction=0.0)])
    assert not any(snapshots.still)


def test_regrown_weights_start_from_zero_without_a_past(train, tiny):
    pruning = KINDS["rank"](apply="growth_only")
    module = tiny("adamw")
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            self.before = {name: pruning.masks[name].clone() for name in pruning.masks}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            for name, weight in pruning.weights.items():
                grown = pruning.masks[name] & ~self.before[name]
                states = trainer.optimizers[0].state[weight]
                seen.append(int(grown.sum()))
                assert not weight[grown].any()
                assert not states["exp_avg"][grown].any()
                assert not states["max_exp_avg_sq"][grown].any()

    train(module, [pruning, Watch()])
    assert sum(seen) > 10


def test_per_layer_counts_change_only_by_the_cut(train, tiny):
    pruning = KINDS["rank"](drop_fraction=0.9, topology_end=1.0)
    counts, masks = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if pruning.settled:
                counts.append(pruning.masks.counts())
                masks.append(pruning.masks.checksum())

    train(tiny(), [pruning, Watch()])
    assert all(count == counts[0] for count in counts)
    assert len(set(masks)) > 1  # weights still moved
    assert sum(counts[0].values()) == 1272 - round(0.8 * 1272) + 1


def test_no_decomposition_without_rank_weight(train, tiny, monkeypatch):
    def never(*_):
        raise AssertionError("decomposed")

    for function in ("eigh", "eigvalsh", "svd"):
        monkeypatch.setattr(torch.linalg, function, never)
    train(tiny(), [KINDS["rank"](rank_weight=0.0, report_ranks=False)])


@pytest.mark.parametrize(("rank_on", "names"), [("conv", ["0", "2"]), ("linear", ["6"]), ("all", "026")])
def test_rank_loss_acts_on_the_chosen_layers(rank_on, names, train, tiny):
    pruning = KINDS["rank"](rank_on=rank_on)
    train(tiny(), [pruning], max_epochs=3)
    assert list(pruning.ranked_weights()) == [f"network.{name}.weight" for name in names]


def test_gram_and_svd_give_the_same_run(train, tiny):
    runs = []
    for backend in ("gram", "svd"):
        pruning, module = KINDS["rank"](svd_backend=backend), tiny()
        train(module, [pruning])
        runs.append((pruning.masks.checksum(), module.state_dict()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-5)


def test_rank_gradient_reaches_weights_that_the_loss_did_not_use(train, tiny):
    module = tiny()
    extra = torch.nn.Conv2d(4, 4, 3)
    module.unused = extra
    before = extra.weight.detach().clone()
    train(module, [KINDS["rank"](include=["unused", "network.0"], drop_fraction=0.0)])
    kept = extra.weight != 0
    assert 0 < int(kept.sum()) < 144
    assert not torch.equal(extra.weight[kept], before[kept])


def test_logged_values(train, tiny):
    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            values.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    train(tiny(), [KINDS["rank"](log_ranks=True), Watch()])
    assert values[-1]["rpg/density"] == pytest.approx(0.2, abs=0.002)
    assert values[-1]["rpg/rank_loss"] == pytest.approx(-0.2, abs=0.1)
    assert values[2]["rpg/drop_fraction"] > values[20]["rpg/drop_fraction"] > values[-1]["rpg/drop_fraction"]
    assert 1 <= values[-1]["rpg/mean_delta_rank"] <= 8


def test_non_finite_gradients_postpone_the_update(train, tiny, caplog):
    pruning = KINDS["magnitude"](schedule="exponential")
    module = tiny()

    class Overflow(Callback):
        def on_after_backward(self, trainer, module) -> None:
            if trainer.global_step in (7, 8):  # steps 8 (an update) and 9
                module.network[0].weight.grad[0, 0, 0, 0] = float("nan")

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            for parameter in module.parameters():
                parameter.grad.nan_to_num_(0)

    with caplog.at_level("INFO"):
        train(module, [pruning, Overflow()])
    steps = [row[0] for row in pruning.state_dict()["history"]]
    assert steps[:4] == [0, 4, 10, 12]
    assert "not finite at step 8" in caplog.text
    # the late update still has the density of its own place in the schedule
    assert pruning.state_dict()["history"][2][1] == pytest.approx(0.2 ** (1 / 7), abs=2e-3)


@pytest.mark.parametrize("kind", list(KINDS))
def test_exponential_average_ends_with_the_same_zeros(kind, train, tiny):
    pruning, average = KINDS[kind](), EMAWeightAveraging(decay=0.9)
    module = tiny()
    for callbacks in ([pruning, average], [average, pruning]):
        train(module, callbacks)  # the validations in between check swapped-in averages
        assert pruning.masks.violations(dict(pruning.weights)) == []
        copies = dict(average._average_model.module.named_parameters())
        assert pruning.masks.violations({name: copies[name] for name in pruning.masks}) == []
        assert pruning.masks.density() == pytest.approx(0.2, abs=0.003)


def test_stochastic_weight_averaging_ends_with_the_same_zeros(train, tiny):
    pruning = KINDS["magnitude"]()
    module = tiny()
    train(module, [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2), pruning], max_epochs=6)
    assert pruning.masks.violations(dict(pruning.weights)) == []
    assert sum(int((weight != 0).sum()) for weight in pruning.weights.values()) == pytest.approx(KEPT, abs=3)


def test_tampering_is_caught_at_validation(train, tiny):
    class Tamper(Callback):
        def on_validation_start(self, trainer, module) -> None:
            module.network[2].weight.data += 1

    with pytest.raises(RuntimeError, match=r"not zero in network\.2\.weight"):
        train(tiny(), [KINDS["magnitude"](), Tamper()])


def test_a_second_fit_goes_on_with_the_masks(train, tiny):
    pruning, module = KINDS["magnitude"](), tiny()
    train(module, [pruning])
    first = pruning.masks.checksum()
    with pytest.warns(UserWarning, match="total_steps=16"):
        train(module, [pruning], max_epochs=2)
    assert pruning.masks.checksum() == first
    assert pruning.step == 56
    train(tiny(), [pruning])  # other weights: from the start
    assert pruning.step == 40


def test_results_list_every_layer(train, tiny, tmp_path):
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    module = tiny()
    train(module, [KINDS["magnitude"]()])
    fresh = MagnitudePruning(target_sparsity=0.8)  # `test` of a pruned module needs no fit
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[fresh], default_root_dir=tmp_path)
    trainer.test(
        module, DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long()))
    )
    report = fresh.results(trainer, module)
    assert report["sparsity"] == pytest.approx(0.8, abs=0.003)
    assert [row["name"] for row in report["layers"]] == [f"network.{name}.weight" for name in (0, 2, 6)]
    assert sum(row["zeros"] for row in report["layers"]) == report["zeros"]
    assert [row["max_rank"] for row in report["layers"]] == [8, 12, 4]
    assert all(1 <= row["effective_rank"] <= row["max_rank"] for row in report["layers"])
