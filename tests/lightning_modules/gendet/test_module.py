"""GenDet through the Trainer: what each stage changes and reads, faults, the toy of the spec."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.gendet import GenDet, StageSchedule
from lightning_modules.gendet.evaluation import best_threshold
from lightning_modules.gendet.losses import agreement_loss, disagreement_loss
from lightning_modules.gendet.schedule import STAGES

SMALL = {"dim": 16, "heads": 2, "teacher_lr": 1e-3, "student_lr": 1e-3, "classifier_lr": 1e-3}
CHANGES = {
    "teacher": {"embed", "teacher", "teacher_head"},
    "real": {"student"},
    "fake": {"student"},
    "augment": {"augmenter"},
    "classifier": {"classifier"},
}


class Watch(Callback):
    """Which parts an epoch changed, and which labels it read."""

    def __init__(self, snapshot):
        self.snapshot, self.changed, self.read = snapshot, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = self.snapshot(pl_module.network)
        self.read.append(set())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.read[-1] |= set(batch["label"].tolist())

    def on_train_epoch_end(self, trainer, pl_module):
        after = self.snapshot(pl_module.network)
        changed = {name for name in after if not torch.equal(after[name], self.before[name])}
        self.changed.append((pl_module.stage, changed))


def test_stages_change_and_read_only_their_own(fit, toy, stub, snapshot):
    schedule = StageSchedule(1, 2, 1)
    module, watch = GenDet(stub(), schedule, **SMALL), Watch(snapshot)
    fit(module, toy(), schedule.total, callbacks=[watch])
    assert [stage for stage, _ in watch.changed] == [schedule.stage(e) for e in range(schedule.total)]
    for (stage, changed), read in zip(watch.changed, watch.read, strict=True):
        assert changed == CHANGES[stage], stage
        assert read == {"real": {0}, "fake": {1}, "augment": {1}}.get(stage, {0, 1})
    assert module.stage_steps.tolist() == [8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("options", "untouched"),
    [({"use_augmenter": False}, {"augmenter"}), ({"use_fake_stage": False}, {"augmenter"})],
)
def test_ablations_leave_the_augmenter_alone(fit, toy, stub, snapshot, options, untouched):
    schedule = StageSchedule(1, 1, 1, **options)
    module = GenDet(stub(), schedule, **SMALL)
    before = snapshot(module.network)
    fit(module, toy(), schedule.total)
    after = snapshot(module.network)
    assert {name for name in after if torch.equal(after[name], before[name])} == untouched


def test_without_an_augmenter_it_is_the_identity(stub):
    module = GenDet(stub(), StageSchedule(use_augmenter=False), **SMALL)
    embedded = torch.randn(3, 16)
    assert module.augmented(embedded) is embedded


def test_one_optimiser_serves_real_and_fake_epochs(stub):
    teacher, student, augmenter, classifier = GenDet(
        stub(), **SMALL, augmenter_lr=5e-4
    ).configure_optimizers()
    rates = [o.param_groups[0]["lr"] for o in (teacher, student, augmenter, classifier)]
    assert rates == [1e-3, 1e-3, 5e-4, 1e-3]
    assert all(type(o) is torch.optim.AdamW for o in (teacher, student, augmenter, classifier))


def test_the_length_of_the_run_must_be_the_schedule_s(fit, toy, stub):
    with pytest.raises(MisconfigurationException, match=r"max_epochs is 4, but the schedule has 5"):
        fit(GenDet(stub(), StageSchedule(1, 1, 1), **SMALL), toy(), 4)
    with pytest.raises(MisconfigurationException, match="reload_dataloaders_every_n_epochs: 1"):
        fit(
            GenDet(stub(), StageSchedule(1, 1, 1), **SMALL),
            toy(),
            5,
            reload_dataloaders_every_n_epochs=0,
        )


def test_stages_without_a_trained_teacher_are_refused(fit, toy, stub):
    schedule = StageSchedule(0, 1, 1)
    with pytest.raises(MisconfigurationException, match="the teacher was never trained"):
        fit(GenDet(stub(), schedule, **SMALL), toy(), schedule.total)


def test_testing_what_was_never_trained_is_refused(trainer, toy, stub):
    with pytest.raises(MisconfigurationException, match="classifier was never trained"):
        trainer().test(GenDet(stub(), **SMALL), datamodule=toy(), verbose=False)


@pytest.mark.parametrize("options", [{"margin": 0.0}, {"margin": 4.5}, {"heads": 3}])
def test_bad_options(stub, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GenDet(stub(), **{**SMALL, **options})


def test_a_stage_that_gets_the_wrong_labels_says_so(fit, toy, stub):
    data = toy()
    data._dataset = lambda split: data.datasets[split]  # a data module that does not ask
    schedule = StageSchedule(1, 1, 1)
    with pytest.raises(MisconfigurationException, match=r"only read labels \[0\]"):
        fit(GenDet(stub(), schedule, **SMALL), data, schedule.total)


def test_labels_outside_zero_and_one(fit, toy, stub):
    data = toy()
    data.sets["train"].labels[3] = 2
    data._dataset = lambda split: data.datasets[split]
    with pytest.raises(MisconfigurationException, match="labels must be 0"):
        fit(GenDet(stub(), StageSchedule(1, 0, 0), **SMALL), data, 1)


def test_features_of_another_width(fit, toy, stub):
    with pytest.raises(MisconfigurationException, match=r"48 wide, but stub gives 40"):
        fit(GenDet(stub(40), StageSchedule(1, 0, 0), **SMALL), toy(), 1)


def test_infinite_features_stop_the_run(fit, toy, stub):
    data = toy()
    data.sets["train"].stores[0].features[5] = float("nan")
    with pytest.raises(RuntimeError, match="Loss term not finite: teacher = nan"):
        fit(GenDet(stub(), StageSchedule(1, 0, 0), **SMALL), data, 1)


class Pull(torch.nn.Module):
    """A term of its own parameter, to see which optimiser trains it and when it is asked."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.stages = set()

    def forward(self, module, batch, outputs):
        self.stages.add(module.stage)
        return {"pull": self.scale.square()}


def test_an_objective_is_for_one_optimiser_and_its_stages(fit, toy, stub):
    schedule, objective = StageSchedule(1, 1, 1), Pull()
    module = GenDet(stub(), schedule, **{**SMALL, "student_lr": 0.1})
    module.attach_objective("extra", objective, "student")
    run = fit(module, toy(), schedule.total)
    assert objective.stages == {"real", "fake"}
    assert objective.scale < 0.9
    assert "train/extra/pull" in run.logged_metrics or "train/extra/pull" in run.callback_metrics
    groups = [{p for group in o.param_groups for p in group["params"]} for o in run.optimizers]
    assert [objective.scale in group for group in groups] == [False, True, False, False]


@pytest.mark.parametrize("optimizer", [None, "generator"])
def test_an_objective_for_no_optimiser_is_refused(optimizer, stub):
    with pytest.raises(
        MisconfigurationException,
        match=f"'extra' is for the optimiser {optimizer}, .*: teacher, student, augmenter, classifier",
    ):
        GenDet(stub(), **SMALL).attach_objective("extra", Pull(), optimizer)


def test_the_score_in_fit_is_the_stage_s(fit, toy, stub):
    schedule, found = StageSchedule(1, 1, 1), []

    class Scorers(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            found.append(pl_module.scorer())

    fit(GenDet(stub(), schedule, **SMALL), toy(), schedule.total, callbacks=[Scorers()])
    assert found == ["teacher", "discrepancy", "discrepancy", "discrepancy", "classifier"]


def test_the_calibrated_threshold_comes_from_validation_only(fit, toy, stub, trainer):
    schedule = StageSchedule(1, 1, 2)
    module, data = GenDet(stub(), schedule, **SMALL), toy()
    run = fit(module, data, schedule.total)
    chosen = module.threshold.clone()
    assert 0 < chosen < 1
    assert chosen != 0.5
    data.sets["test"].labels[:] = 1 - data.sets["test"].labels
    run.test(module, datamodule=data, verbose=False)
    run.validate(module, datamodule=data, verbose=False)
    assert module.threshold == chosen


def test_the_teacher_alone(fit, toy, stub):
    schedule = StageSchedule(2, 0, 0)
    module, data = GenDet(stub(), schedule, detector="teacher", **SMALL), toy()
    fit(module, data, schedule.total).test(module, datamodule=data, verbose=False)
    torch.testing.assert_close(module.rows["score"], module.rows["teacher"].sigmoid())
    assert "discrepancy" not in module.rows, "an untrained student says nothing"


def test_one_and_two_optimisers_of_the_student(toy, stub):
    """With an optimiser of its own for each loss, Adam would not see alpha; the shared one does."""

    def student(alpha, shared):
        torch.manual_seed(0)
        module = GenDet(stub(), StageSchedule(use_augmenter=False), alpha=alpha, **SMALL)
        network, data = module.network, toy().sets["train"]
        batch = data.__getitems__(list(range(128)))
        real, fake = (network.embed(batch["features"][batch["label"] == label]).detach() for label in (0, 1))
        first = torch.optim.AdamW(network.student.parameters(), lr=1e-3)
        second = first if shared else torch.optim.AdamW(network.student.parameters(), lr=1e-3)
        for _ in range(4):
            for optimizer, loss in (
                (first, lambda: agreement_loss(network.teacher(real), network.student(real))),
                (second, lambda: disagreement_loss(network.teacher(fake), network.student(fake), 2.0, alpha)),
            ):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in network.student.parameters()])

    torch.testing.assert_close(student(1.0, False), student(10.0, False), atol=2e-4, rtol=0)
    assert (student(1.0, True) - student(10.0, True)).abs().max() > 2e-3


def test_a_whole_run_in_features(fit, toy, stub):
    """The spec's miniature: artefacts share nothing, yet the discrepancy knows unseen generators a little."""
    auc, teacher = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        schedule = StageSchedule(5, 5, 5, use_augmenter=False)
        module = GenDet(stub(), schedule, teacher_lr=1e-3, student_lr=1e-3, classifier_lr=1e-3)
        data = toy(count=512, generators=5, seed=seed, batch_size=64)
        run = fit(module, data, schedule.total, check_val_every_n_epoch=15)
        run.test(module, datamodule=data, verbose=False)
        unseen = [row for row in module.generator_scores if not row.seen]
        assert len(unseen) == 4
        auc.append(sum(row.discrepancy_auc for row in unseen) / 4)
        teacher.append(sum(row.teacher_ap for row in unseen) / 4)
        (seen,) = (row for row in module.generator_scores if row.seen)
        assert seen.teacher_ap > 0.97
    assert sum(auc) / 3 > 0.52
    assert abs(sum(teacher) / 3 - 0.5) < 0.06


def test_a_real_epoch_brings_student_and_teacher_together_and_a_fake_epoch_apart(fit, toy, stub):
    found = []

    class Losses(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            network, data = pl_module.network, trainer.datamodule.sets["train"]
            with torch.no_grad():
                embedded = network.embed(data.__getitems__(list(range(len(data))))["features"])
                real, moved = embedded[data.labels == 0], pl_module.augmented(embedded[data.labels == 1])
                pair = network.teacher(moved), network.student(moved)
                losses = (
                    agreement_loss(network.teacher(real), network.student(real)),
                    disagreement_loss(*pair),
                    agreement_loss(*pair),
                )
            found.append((pl_module.stage, *(loss.item() for loss in losses)))

    schedule = StageSchedule(3, 3, 0)
    module = GenDet(stub(), schedule, **SMALL)
    fit(module, toy(count=256), schedule.total, callbacks=[Losses()])
    for before, (stage, real, fake, augment) in itertools.pairwise(found[2:]):
        if stage == "real":
            assert real < before[1]
        elif stage == "fake":
            assert fake < before[2]
            assert augment > before[3]
        else:
            assert augment < before[3]
            assert fake > before[2]
    assert {row[0] for row in found} == set(STAGES) - {"classifier"}


def test_averaged_weights_end_trained_and_with_the_threshold_that_was_chosen(fit, toy, stub, tmp_path):
    """Averaging every buffer would truncate the counts of steps and blur the threshold."""
    schedule = StageSchedule(1, 1, 1)
    module = GenDet(stub(), schedule, **SMALL)
    run = fit(module, toy(), schedule.total, callbacks=[EMAWeightAveraging(decay=0.9)])
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["stage_steps"].tolist() == [8, 4, 4, 4, 8]
    best = best_threshold(module.rows["score"], module.rows["label"])
    assert saved["threshold"].item() == module.threshold.item() == pytest.approx(best)
    run.test(module, datamodule=toy(), verbose=False)
